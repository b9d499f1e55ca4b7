"""The reference scan: a Python loop over the step. Always right, and what every faster engine is tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def loop(cell: Any, xs: Any, state: Any) -> tuple[Tensor, Any]:
    """`state = cell.step(xs[t], state)` for each t; the first fields of all states, and the last state."""
    outputs = []
    for x in _unbind(xs):
        state = cell.step(x, state)
        outputs.append(state[0])
    return torch.stack(outputs), state


def _unbind(xs: Any) -> list[Any]:
    """The streams' values at each step."""
    if not isinstance(xs, dict):
        return list(xs.unbind(0))
    columns = zip(*(stream.unbind(0) for stream in xs.values()), strict=True)
    return [dict(zip(xs, values, strict=True)) for values in columns]
