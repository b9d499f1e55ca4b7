"""`nn.RNN`, `nn.LSTM` and `nn.GRU` with one more argument: the integrator.

What works with other libraries, and what does not:

- `torch.export` and the transforms of `torch.func` take the layers. `torch.jit.script` and `torch.fx.symbolic_trace`
  do not.
- Opacus' hooks give the gradients of layers with one input, and an integrator has two. Take per-sample gradients by
  `torch.func.vmap` of `torch.func.grad`.
- `torch.ao.quantization.quantize_dynamic` leaves our layers as they are: it looks for `nn.Linear` and `nn.LSTM`
  themselves, and not for what derives from them.
- What asks for an `nn.RNNBase`, as pytorch-forecasting does, refuses them.
- TorchRL's `LSTMModule(lstm=...)` calls layers other than `nn.LSTM` with a `mask` (B, T), True at the first steps of
  each sequence. A subclass whose `forward` takes it can give it on as `lengths=mask.sum(1)`.

A layer in the place of PyTorch's starts otherwise: with unit variances, and not with U(−1/√H, 1/√H). It may need
another rate. On the adding problem (T = 50, H = 64, batches of 64, Adam at 0.003, gradients clipped to norm 1, 600
steps, seeds 0 to 2) the squared error on 1000 new sequences is 0.171 to 0.173 with `nn.LSTM`, 0.169 to 0.173 with
`from_torch(nn.LSTM)`, 0.002 to 0.007 with `LSTM(integrator=Additive)` and 0.001 to 0.007 with `LSTM`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from multint.cells import Cell, GRUCell, LSTMCell, RNNCell
from multint.errors import MultintError, OptionError, OptionTypeError, ShapeError
from multint.integrators import Integrator, MultiplicativeIntegration
from multint.integrators.checks import check_callable, flag
from multint.recurrent.layer import Recurrent

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


class _DropIn(Recurrent):
    """What the three share: PyTorch's order of arguments, and what its users call and read."""

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        cell: Callable[[int, int], Cell],
        num_layers: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **settings: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, cell, num_layers, **settings)
        self.mode = mode
        self.bias = bias
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            raise OptionTypeError(f"{type(self).__name__}: dtype is {dtype}, expected one of real or complex numbers")
        self.to(device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor | PackedSequence,  # (T, B, X); (B, T, X) if batch_first; (T, X) unbatched
        hx: Any = None,  # h (L·D, B, H), or (h, c)
        *,
        lengths: Tensor | list[int] | None = None,  # (B,)
        reset: Tensor | None = None,  # (T, B) bool
    ) -> tuple[Any, Any]:  # (T, B, ·), and h, or the tuple (h, c)
        """Run the stack, see `Recurrent`. The state is a plain tuple, as `nn.LSTM` gives it.

        Raises: ShapeError also for an input or a state that has not the weights' dtype.
        """
        self._check_dtypes(input, hx)
        output, state = super().forward(input, hx, lengths=lengths, reset=reset)
        return output, state if isinstance(state, Tensor) else tuple(state)

    def _check_dtypes(self, input: Any, hx: Any) -> None:
        """Raise a ShapeError for another dtype than the weights'; under autocast only for what is no float."""
        first: Any = self.directions[0]  # its cell's parameters are soon found, at every call
        dtype = next((parameter.dtype for parameter in first.cell.parameters()), None)  # None: DataParallel's copies
        names = [f"state.{name}" for name in first.form._fields]
        given = [("x", input.data if isinstance(input, PackedSequence) else input)]
        given += zip(names, hx if isinstance(hx, tuple | list) else [hx], strict=False)
        for name, tensor in given:
            if not isinstance(tensor, Tensor) or tensor.dtype == dtype or dtype is None:
                continue
            if tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type):
                continue
            cure = f"convert it by .to({dtype})"
            if tensor.is_floating_point():
                cure += f", or the layer by .to({tensor.dtype})"
            raise ShapeError(
                f"{type(self).__name__}: {name} is {tensor.dtype}, expected {dtype}, as the weights are: {cure}"
            )

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each direction of each layer. Their names are our own, see `named_parameters`."""
        return [list(direction.parameters()) for direction in self.directions]

    def flatten_parameters(self) -> None:
        """Do nothing: there is no vendor's buffer to lay out. Users of `nn.LSTM` call it."""


class RNN(_DropIn):
    """`nn.RNN` with an integrator: h' = φ(f(x, h)).

    Args:
        nonlinearity: φ, "tanh" or "relu" as in `nn.RNN`, or any elementwise callable.
        bias: whether the integrator has its b.
        integrator: factory `(X, H, O) -> Integrator`.
        zoneout, input_dropout, state_dropout, weight_drop, weight_noise, learnt_state, engine: as in `Recurrent`; the
            other arguments are those of `nn.RNN`.

    Raises: OptionError for a setting out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str | Callable[[Tensor], Tensor] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
        zoneout: float | dict[str, float] = 0.0,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        weight_drop: float = 0.0,
        weight_noise: float = 0.0,
        learnt_state: bool = False,
        engine: str = "auto",
    ) -> None:
        if isinstance(nonlinearity, str) and nonlinearity not in ACTIVATIONS:
            raise OptionError(f"RNN: nonlinearity is {nonlinearity!r}, expected 'tanh', 'relu', or a callable")
        activation = ACTIVATIONS[nonlinearity] if isinstance(nonlinearity, str) else nonlinearity
        check_callable(self, "nonlinearity", activation, "'tanh', 'relu', or a callable")
        cell = partial(RNNCell, integrator=_biased(self, integrator, bias), activation=activation)
        super().__init__(
            f"RNN_{nonlinearity.upper()}" if isinstance(nonlinearity, str) else "RNN",
            input_size, hidden_size, cell, num_layers, bias, device, dtype,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, zoneout=zoneout,
            input_dropout=input_dropout, state_dropout=state_dropout, weight_drop=weight_drop,
            weight_noise=weight_noise, learnt_state=learnt_state, engine=engine,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


class LSTM(_DropIn):
    """`nn.LSTM` with an integrator: (i, f, g, o) = gates(x, h). See `LSTMCell` for the equations.

    Args:
        bias: whether the integrator has its b.
        proj_size: features P of the output where it is projected, 0 for no projection.
        integrator: factory `(X, H, O) -> Integrator`.
        peepholes, forget_bias, memory_norm: as in `LSTMCell`.
        zoneout, input_dropout, state_dropout, weight_drop, weight_noise, learnt_state, engine: as in `Recurrent`; the
            other arguments are those of `nn.LSTM`.

    Raises: OptionError for a setting out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
        peepholes: bool = False,
        forget_bias: float = 0.0,
        memory_norm: Callable[[int], nn.Module] | None = None,
        zoneout: float | dict[str, float] = 0.0,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        weight_drop: float = 0.0,
        weight_noise: float = 0.0,
        learnt_state: bool = False,
        engine: str = "auto",
    ) -> None:
        cell = partial(
            LSTMCell,
            integrator=_biased(self, integrator, bias),
            peepholes=peepholes,
            forget_bias=forget_bias,
            proj_size=proj_size,
            memory_norm=memory_norm,
        )
        super().__init__(
            "LSTM", input_size, hidden_size, cell, num_layers, bias, device, dtype,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, zoneout=zoneout,
            input_dropout=input_dropout, state_dropout=state_dropout, weight_drop=weight_drop,
            weight_noise=weight_noise, learnt_state=learnt_state, engine=engine,
        )  # fmt: skip
        self.proj_size = proj_size


class GRU(_DropIn):
    """`nn.GRU` with an integrator for the gates (r, z) and the candidate. See `GRUCell` for the equations.

    Args:
        bias: whether the integrators have their b, and the candidate its b_r.
        integrator: factory `(X, H, O) -> Integrator`.
        reset_after: apply the reset after the product, as `nn.GRU` does; False applies it before (Wu et al. 2016, A.2).
        zoneout, input_dropout, state_dropout, weight_drop, weight_noise, learnt_state, engine: as in `Recurrent`; the
            other arguments are those of `nn.GRU`.

    Raises: OptionError for a setting out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
        reset_after: bool = True,
        zoneout: float | dict[str, float] = 0.0,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        weight_drop: float = 0.0,
        weight_noise: float = 0.0,
        learnt_state: bool = False,
        engine: str = "auto",
    ) -> None:
        cell = partial(
            GRUCell,
            integrator=_biased(self, integrator, bias),
            reset_after=reset_after,
            recurrent_bias=0.0 if bias else None,
        )
        super().__init__(
            "GRU", input_size, hidden_size, cell, num_layers, bias, device, dtype,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, zoneout=zoneout,
            input_dropout=input_dropout, state_dropout=state_dropout, weight_drop=weight_drop,
            weight_noise=weight_noise, learnt_state=learnt_state, engine=engine,
        )  # fmt: skip


def _biased(
    owner: nn.Module, integrator: Callable[..., Integrator], bias: bool
) -> Callable[[int, int, int], Integrator]:
    """The factory, told to leave b out where `bias` is False."""
    return integrator if flag(owner, "bias", bias) else partial(_without_bias, integrator)


def _without_bias(
    integrator: Callable[..., Integrator], x_features: int, z_features: int, out_features: int
) -> Integrator:
    try:
        return integrator(x_features, z_features, out_features, bias=None)
    except MultintError:
        raise
    except TypeError as error:
        raise OptionError(
            f"bias is False, which the integrator cannot be told ({error}); expected one with an argument `bias`, "
            "or a factory that leaves it out itself, with bias=True here"
        ) from error
