"""What enters a step beside the input: lengths, resets, zoneout and locked dropout, as streams of masks."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from multint.cells import Cell
from multint.engines import scan
from multint.errors import OptionError
from multint.integrators import outermost_integrators


class StateDropout:
    """A forward pre-hook that multiplies an integrator's z by a mask while there is one.

    The mask meets z inside the step and not the state around it: a GRU's state is also its memory, which must pass
    undropped (Gal and Ghahramani 2016). So a cell passes its state as z, the second stream.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None  # (B, Z)

    def __call__(
        self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if self.mask is None:
            return args, kwargs
        if "z" in kwargs:
            return args, kwargs | {"z": kwargs["z"] * self.mask}
        x, z = args
        return (x, z * self.mask), kwargs


class Masked(nn.Module):
    """One direction of one layer: a cell whose step also heeds masks, which come as streams beside x.

    The streams are (T, B, ...): "x"; "valid", False past a sequence's end, where the state stays as it is; "reset",
    True where an episode starts, before which the state returns to the initial one; "zoneout.FIELD", True where that
    field of the state keeps its old value; "dropout.NAME", the multiplier of z in the cell's integrator of that name.

    Args:
        zoneout: for each field of the state, the probability of keeping the old value (Krueger et al. 2017).
        state_dropout: probability of dropping a feature of z in every integrator, the same at every step.
        weight_drop: probability of dropping an entry of the integrators' recurrent matrices (Merity et al. 2018).

    Raises: OptionError where the cell has no integrator or no recurrent matrix to drop.
    """

    def __init__(self, cell: Cell, zoneout: dict[str, float], state_dropout: float, weight_drop: float) -> None:
        super().__init__()
        self.cell = cell
        self.zoneout = zoneout
        self.state_dropout = state_dropout
        self.weight_drop = weight_drop
        self.integrators = outermost_integrators(cell)
        self.hooks = {name: StateDropout() for name in self.integrators} if state_dropout else {}
        for name, hook in self.hooks.items():
            cell.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        self.dropped_weights = (
            [f"cell.{name}.{w}" for name, f in self.integrators.items() for w in f.z_weights] if weight_drop else []
        )
        if state_dropout and not self.integrators:
            raise OptionError(f"state_dropout: {type(cell).__name__} has no integrator whose z could be dropped")
        if weight_drop and not self.dropped_weights:
            raise OptionError(f"weight_drop: {type(cell).__name__} has no integrator that names its z_weights")

    def forward(self, streams: dict[str, Tensor], state: Any, engine: str) -> tuple[Tensor, Any]:
        return scan(self, streams, state, engine)

    def run(self, streams: dict[str, Tensor], state: Any, engine: str) -> tuple[Tensor, Any]:
        """Scan with the noise of one training pass, or without it in evaluation."""
        if not self.training:
            return self(streams, state, engine)
        streams = streams | self._noise(streams["x"], state)
        if not self.dropped_weights:
            return self(streams, state, engine)
        dropped = {name: functional.dropout(_attribute(self, name), self.weight_drop) for name in self.dropped_weights}
        return torch.func.functional_call(self, dropped, (streams, state, engine))

    def step(self, streams: dict[str, Tensor], state: Any) -> Any:
        """The cell's step, with the masks applied around it."""
        if "reset" in streams:
            state = _where(streams["reset"], self.cell.initial_state(streams["x"].shape[0]), state)
        for name, hook in self.hooks.items():
            hook.mask = streams.get(f"dropout.{name}")
        try:
            new = self.cell.step(streams["x"], state)
        finally:
            for hook in self.hooks.values():
                hook.mask = None
        for field, probability in self.zoneout.items():
            new = new._replace(**{field: self._zone(field, probability, streams, getattr(state, field), new)})
        return _where(streams["valid"], new, state) if "valid" in streams else new

    def _zone(self, field: str, probability: float, streams: dict[str, Tensor], old: Tensor, new: Any) -> Tensor:
        value: Tensor = getattr(new, field)
        old = old.to(value.dtype)
        if self.training:
            return torch.where(streams[f"zoneout.{field}"], old, value)
        return torch.lerp(value, old, probability)  # the mean over the masks

    def _noise(self, x: Tensor, state: Any) -> dict[str, Tensor]:
        """Draw the masks of one pass over T steps."""
        steps, batch_size = x.shape[:2]
        noise = {}
        for field, probability in self.zoneout.items():
            shape = (steps, *getattr(state, field).shape)
            noise[f"zoneout.{field}"] = torch.rand(shape, device=x.device) < probability
        for name in self.hooks:
            mask = locked_mask(x.new_empty(batch_size, self.integrators[name].z_features), self.state_dropout)
            noise[f"dropout.{name}"] = mask.expand(steps, -1, -1)
        return noise


def locked_mask(like: Tensor, probability: float) -> Tensor:
    """A dropout mask of the given shape, 0 or 1/(1 − p), to be used at every step."""
    return functional.dropout(torch.ones_like(like), probability)


def _attribute(module: nn.Module, name: str) -> Any:
    """A parameter by its dotted name, or what a functional call has put in its place, which is no `nn.Parameter`."""
    return reduce(getattr, name.split("."), module)


def _where(mask: Tensor, new: Any, old: Any) -> Any:
    """The new state in the rows (B,) where the mask holds and the old one elsewhere, in the new one's dtypes."""
    return type(new)(
        *(torch.where(mask.view(-1, *[1] * (n.ndim - 1)), n, o.to(n.dtype)) for n, o in zip(new, old, strict=True))
    )
