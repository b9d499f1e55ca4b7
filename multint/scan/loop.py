"""The reference scan: a Python loop over the step. Always right, and what every faster engine is tested against."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from multint.errors import OptionError, ShapeError

State = TypeVar("State", bound=tuple[Tensor, ...])
Streams = Tensor | dict[str, Tensor]

ENGINES = ("auto", "loop")


class Steppable(Protocol[State]):
    """What a scan needs of a cell: one step."""

    def step(self, x: Any, state: State, /) -> State: ...


def scan(
    cell: Steppable[State],
    xs: Streams,  # (T, B, X), or several streams by name, each (T, B, ...)
    state: State,  # of tensors (B, ...)
    engine: str = "auto",
) -> tuple[Tensor, State]:  # (T, B, H), and the state after step T
    """Run `state = cell.step(xs[t], state)` for t = 0 … T−1 and collect the first field of every state.

    Where `xs` is a dict, the step gets a dict of the same keys with each stream at t.

    Args:
        engine: "loop", the Python loop; or "auto", which takes the fastest engine that can run the cell.

    Raises: OptionError for an unknown engine; ShapeError for streams of no steps or of different lengths.
    """
    if engine not in ENGINES:
        raise OptionError(f"scan: engine is {engine!r}, expected one of {', '.join(map(repr, ENGINES))}")
    inputs = _unbind(xs)
    outputs = []
    for x in inputs:
        state = cell.step(x, state)
        outputs.append(state[0])
    return torch.stack(outputs), state


def _unbind(xs: Streams) -> list[Any]:
    """The streams' values at each step."""
    lengths = {len(stream) for stream in xs.values()} if isinstance(xs, dict) else {len(xs)}
    if len(lengths) != 1 or 0 in lengths:
        raise ShapeError(f"scan: xs has the lengths {sorted(lengths)} in time, expected one length of at least 1")
    if not isinstance(xs, dict):
        return list(xs.unbind(0))
    columns = zip(*(stream.unbind(0) for stream in xs.values()), strict=True)
    return [dict(zip(xs, values, strict=True)) for values in columns]
