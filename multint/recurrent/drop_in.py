"""`nn.RNN`, `nn.LSTM` and `nn.GRU` with one more argument: the integrator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from multint.cells import Cell, GRUCell, LSTMCell, RNNCell
from multint.errors import OptionError
from multint.integrators import Integrator, MultiplicativeIntegration
from multint.recurrent.layer import Recurrent

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


class _DropIn(Recurrent):
    """What the three share: PyTorch's order of arguments, and what its users call and read."""

    def __init__(
        self,
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
        self.bias = bias
        self.to(device=device, dtype=dtype)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no vendor's buffer to lay out. Users of `nn.LSTM` call it."""


class RNN(_DropIn):
    """`nn.RNN` with an integrator: h' = φ(f(x, h)).

    Args:
        nonlinearity: φ, "tanh" or "relu" as in `nn.RNN`, or any elementwise callable.
        bias: whether the integrator has its b.
        integrator: factory `(X, H, O) -> Integrator`.
        zoneout, input_dropout, state_dropout, weight_drop, learnt_state, engine: as in `Recurrent`; the other arguments
            are those of `nn.RNN`.

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
        learnt_state: bool = False,
        engine: str = "auto",
    ) -> None:
        if isinstance(nonlinearity, str) and nonlinearity not in ACTIVATIONS:
            raise OptionError(f"RNN: nonlinearity is {nonlinearity!r}, expected 'tanh', 'relu', or a callable")
        activation = ACTIVATIONS[nonlinearity] if isinstance(nonlinearity, str) else nonlinearity
        cell = partial(RNNCell, integrator=_biased(integrator, bias), activation=activation)
        super().__init__(
            input_size, hidden_size, cell, num_layers, bias, device, dtype,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, zoneout=zoneout,
            input_dropout=input_dropout, state_dropout=state_dropout, weight_drop=weight_drop,
            learnt_state=learnt_state, engine=engine,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


class LSTM(_DropIn):
    """`nn.LSTM` with an integrator: (i, f, g, o) = gates(x, h). See `LSTMCell` for the equations.

    Args:
        bias: whether the integrator has its b.
        proj_size: features P of the output where it is projected, 0 for no projection.
        integrator: factory `(X, H, O) -> Integrator`.
        peepholes, forget_bias, memory_norm: as in `LSTMCell`.
        zoneout, input_dropout, state_dropout, weight_drop, learnt_state, engine: as in `Recurrent`; the other arguments
            are those of `nn.LSTM`.

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
        learnt_state: bool = False,
        engine: str = "auto",
    ) -> None:
        cell = partial(
            LSTMCell,
            integrator=_biased(integrator, bias),
            peepholes=peepholes,
            forget_bias=forget_bias,
            proj_size=proj_size,
            memory_norm=memory_norm,
        )
        super().__init__(
            input_size, hidden_size, cell, num_layers, bias, device, dtype,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, zoneout=zoneout,
            input_dropout=input_dropout, state_dropout=state_dropout, weight_drop=weight_drop,
            learnt_state=learnt_state, engine=engine,
        )  # fmt: skip
        self.proj_size = proj_size


class GRU(_DropIn):
    """`nn.GRU` with an integrator for the gates (r, z) and the candidate. See `GRUCell` for the equations.

    Args:
        bias: whether the integrators have their b, and the candidate its b_r.
        integrator: factory `(X, H, O) -> Integrator`.
        reset_after: apply the reset after the product, as `nn.GRU` does; False applies it before (Wu et al. 2016, A.2).
        zoneout, input_dropout, state_dropout, weight_drop, learnt_state, engine: as in `Recurrent`; the other arguments
            are those of `nn.GRU`.

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
        learnt_state: bool = False,
        engine: str = "auto",
    ) -> None:
        cell = partial(
            GRUCell,
            integrator=_biased(integrator, bias),
            reset_after=reset_after,
            recurrent_bias=0.0 if bias else None,
        )
        super().__init__(
            input_size, hidden_size, cell, num_layers, bias, device, dtype,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, zoneout=zoneout,
            input_dropout=input_dropout, state_dropout=state_dropout, weight_drop=weight_drop,
            learnt_state=learnt_state, engine=engine,
        )  # fmt: skip


def _biased(integrator: Callable[..., Integrator], bias: bool) -> Callable[[int, int, int], Integrator]:
    """The factory, told to leave b out where `bias` is False."""
    if bias:
        return integrator

    def without_bias(x_features: int, z_features: int, out_features: int) -> Integrator:
        try:
            return integrator(x_features, z_features, out_features, bias=None)
        except TypeError as error:
            raise OptionError(
                f"bias is False, which the integrator cannot be told ({error}); expected one with an argument `bias`, "
                "or a factory that leaves it out itself, with bias=True here"
            ) from error

    return without_bias
