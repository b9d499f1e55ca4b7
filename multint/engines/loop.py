"""The reference scan: a Python loop over the step. Always right, and what every faster engine is tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multint.errors import ShapeError


def loop(cell: Any, xs: Any, state: Any) -> tuple[Tensor, Any]:
    """`state = cell.step(xs[t], state)` for each t; the first fields of all states, and the last state."""
    outputs: list[Tensor] = []
    for x in _unbind(xs):
        before, state = state, cell.step(x, state)
        if not outputs:
            _check_kept(before, state)
        outputs.append(state[0])
    return torch.stack(outputs), state


def _check_kept(before: Any, after: Any) -> None:
    """Raise a ShapeError where a step's streams have made the state more: of more rows, or of more dimensions."""
    for name, old, new in zip(before._fields, before, after, strict=True):
        if new.ndim != old.ndim or new.shape[:1] != old.shape[:1]:
            raise ShapeError(
                f"scan: the step makes state.{name} {tuple(new.shape)} of {tuple(old.shape)}, expected (B, ...) as "
                "before: look at how the streams broadcast with the state"
            )


def _unbind(xs: Any) -> list[Any]:
    """The streams' values at each step."""
    if not isinstance(xs, dict):
        return list(xs.unbind(0))
    columns = zip(*(stream.unbind(0) for stream in xs.values()), strict=True)
    return [dict(zip(xs, values, strict=True)) for values in columns]
