"""What a scan takes: a cell, streams and a state, and what is wrong with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from multint.engines import private
from multint.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from multint.engines.program import Program

State = TypeVar("State", bound=tuple[Tensor, ...])
Streams = Tensor | dict[str, Tensor]

ENGINES = ("auto", "fused", "loop")


class Steppable(Protocol[State]):
    """What a scan needs of a cell: one step."""

    def step(self, x: Any, state: State, /) -> State: ...


def check(cell: Any, xs: Streams, state: Any, engine: str) -> None:
    """Raise an OptionError or a ShapeError, as `scan` says."""
    if engine not in ENGINES:
        raise OptionError(f"scan: engine is {engine!r}, expected one of {', '.join(map(repr, ENGINES))}")
    streams = by_name(xs)
    if all(stream.ndim < 2 for stream in streams.values()):
        raise ShapeError(f"scan: xs has {max(s.ndim for s in streams.values())} dimensions, expected (T, B, ...)")
    lengths = [stream.shape[0] for stream in streams.values()]
    # Compared one by one: in a traced program a length may be a symbol, which no set takes.
    if any(length != lengths[0] for length in lengths) or lengths[0] == 0:
        shown = sorted(set(lengths))
        raise ShapeError(f"scan: xs has the lengths {shown} in time, expected one length of at least 1")
    if not (isinstance(state, tuple) and hasattr(state, "_fields")):
        raise ShapeError(f"scan: state is a {type(state).__name__}, expected a named tuple of tensors (B, ...)")
    _, rows = size_of(xs)
    for name, field in zip(state._fields, state, strict=True):
        if not isinstance(field, Tensor):
            raise ShapeError(f"scan: state.{name} is a {type(field).__name__}, expected a tensor ({rows}, ...)")
        if field.shape[:1] != (rows,):
            got = tuple(field.shape)
            raise ShapeError(f"scan: state.{name} has the shape {got}, expected ({rows}, ...), the batch size of xs")
    # The streams could meet a state of more dimensions than the cell's own too, and nothing would be said.
    if hasattr(cell, "initial_state") and any(field.ndim > 2 for field in state):
        for name, field, own in zip(state._fields, state, cell.initial_state(1), strict=True):
            if field.ndim != own.ndim:
                got, expected = tuple(field.shape), ", ".join(map(str, (rows, *own.shape[1:])))
                raise ShapeError(f"scan: state.{name} has the shape {got}, expected ({expected}), as the cell's own")


def why_not_fused(cell: Any, xs: Streams, state: Any) -> str:
    """Why `fused` cannot be tried, apart from what tracing would find; empty where nothing speaks against it."""
    if not isinstance(cell, nn.Module):
        return "fused: the cell is no nn.Module, so its parameters are unknown"
    if not is_listed(cell):
        return "fused: a module of the cell has no hash, so torch cannot list its parameters"
    if private.global_hooks():
        return "fused: there are hooks on all modules, which would not be called at every step"
    if around := private.surroundings():
        return f"fused: {around}"
    given = [*by_name(xs).values(), *state]
    if len({tensor.shape[:1] for tensor in state} | {stream.shape[1:2] for stream in by_name(xs).values()}) > 1:
        return "fused: the streams have different numbers of rows"
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in given):
        return f"fused: it takes plain tensors, and not {', '.join(sorted({type(t).__name__ for t in given}))}"
    if layouts := {str(tensor.layout) for tensor in given if tensor.layout is not torch.strided}:
        return f"fused: it takes tensors of the layout torch.strided, and not {', '.join(sorted(layouts))}"
    if any(tensor.is_meta for tensor in given):
        return "fused: tensors on the meta device hold no numbers to check the step by"
    if size_of(xs)[1] == 0:
        return "fused: there are no rows"
    return ""


def is_listed(cell: nn.Module) -> bool:
    """Whether torch can list the cell's modules, which takes the hash of each."""
    try:
        return bool(list(cell.modules()))
    except Exception:
        return False


def first_state_differs(program: Program, state: Any) -> str:
    """Why the first state cannot be brought into the dtypes that the step gives it, in which all steps are run.

    A step may do other things with the same numbers in another dtype: `n > 1`, where n is 2 or True. Only the roundings
    of autocast come with the same numbers.
    """
    schedule = program.forward
    for name, shown, field in zip(schedule.fields, state._fields, state, strict=True):
        dtype = schedule.buffers[name].dtype
        if field.dtype == dtype:
            continue
        floats = field.is_floating_point() and dtype.is_floating_point
        by_autocast = floats and torch.is_autocast_enabled(field.device.type)
        if not by_autocast or not torch.equal(field.detach().to(dtype).to(field.dtype), field.detach()):
            return f"fused: the first state's {shown} is {field.dtype}, and the step makes it {dtype}; start from that"
    return ""


def by_name(xs: Streams) -> dict[str, Tensor]:
    """The streams by their names; one that is given by itself is x."""
    return xs if isinstance(xs, dict) else {"x": xs}


def at_a_step(xs: Streams) -> Any:
    """The streams as the first step gets them."""
    return {name: stream[0] for name, stream in xs.items()} if isinstance(xs, dict) else xs[0]


def size_of(xs: Streams) -> tuple[int, int]:
    """T and B."""
    shapes = [stream.shape for stream in by_name(xs).values()]
    # A stream of one row may meet the rows of the others, whichever comes first.
    return shapes[0][0], max(shape[1] for shape in shapes if len(shape) > 1)
