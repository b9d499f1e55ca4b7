"""What is asked before a scan: whether its inputs fit, whether `fused` can be tried, and whether it pays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from multint.engines import private
from multint.engines.native.machine import has_compiler
from multint.engines.tables import record_of
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
    streams = streams_by_name(xs)
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
    if any(field.ndim > 2 for field in state) and hasattr(cell, "initial_state"):
        for name, field, own in zip(state._fields, state, cell.initial_state(1), strict=True):
            if field.ndim != own.ndim:
                got, expected = tuple(field.shape), ", ".join(map(str, (rows, *own.shape[1:])))
                raise ShapeError(f"scan: state.{name} has the shape {got}, expected ({expected}), as the cell's own")


def streams_by_name(xs: Streams) -> dict[str, Tensor]:
    """The streams by their names; one that is given by itself is x."""
    return xs if isinstance(xs, dict) else {"x": xs}


def at_a_step(xs: Streams) -> Any:
    """The streams as the first step gets them."""
    return {name: stream[0] for name, stream in xs.items()} if isinstance(xs, dict) else xs[0]


def size_of(xs: Streams) -> tuple[int, int]:
    """T and B."""
    shapes = [stream.shape for stream in streams_by_name(xs).values()]
    # A stream of one row may meet the rows of the others, whichever comes first.
    return shapes[0][0], max(shape[1] for shape in shapes if len(shape) > 1)


# ---- Whether `fused` can be tried.


def why_not_fused(cell: Any, xs: Streams, state: Any) -> str:
    """Why `fused` cannot be tried, apart from what tracing would find; empty where nothing speaks against it."""
    if reason := _why_looped(cell):
        return reason
    if not isinstance(cell, nn.Module):
        return "fused: the cell is no nn.Module, so its parameters are unknown"
    if not private.are_hashed(cell):
        return "fused: a module of the cell has no hash, so torch cannot list its parameters"
    if private.global_hooks():
        return "fused: there are hooks on all modules, which would not be called at every step"
    if around := private.surroundings():
        return f"fused: {around}"
    streams = streams_by_name(xs).values()
    if len({field.shape[:1] for field in state} | {stream.shape[1:2] for stream in streams}) > 1:
        return "fused: the streams have different numbers of rows"
    for tensor in (*streams, *state):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"fused: it takes plain tensors, and not {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"fused: it takes tensors of the layout torch.strided, and not {tensor.layout}"
        if tensor.is_meta:
            return "fused: tensors on the meta device hold no numbers to check the step by"
    return "" if size_of(xs)[1] else "fused: there are no rows"


def _why_looped(cell: Any) -> str:
    """Why only the loop runs the cell, which says so of itself in `why_looped`; empty where it says nothing."""
    reason = getattr(cell, "why_looped", "")
    return f"fused: {reason}" if reason else ""


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


# ---- Whether it pays to compile, which is what `auto` asks.

# Compiling a native loop takes about 5 s, and what it saves is mostly a step's overhead: .14 to .41 ms a step for both
# passes at H ≤ 128, with two threads (`python -m experiments bench --quick --rounds 7`). So `auto` compiles at once
# where a call is large, which repays it within some hundred calls or a thousand, and what is smaller after so many
# steps, which took the loop about as long as compiling.
_WORTH_COMPILING = 10**7  # multiply-adds of a forward pass
_STEPS_BEFORE = 20_000
# Where each piece is compiled by Inductor, which takes ten times as long; and where there is no compiler, so that
# pieces run op by op, which is slower than the loop at small sizes.
_TIMES_MORE_IN_PIECES, _TIMES_MORE_WITHOUT_COMPILER = 10, 100
_MEASURED = {("cpu", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}


def not_worth_it(cell: Any, xs: Streams) -> str:
    """Why `auto` does not try `fused`; empty where it does."""
    if reason := _why_looped(cell):
        return reason
    if size_of(xs)[0] == 1:
        return "auto: one step is no loop"
    if not isinstance(cell, nn.Module):
        return ""  # which is a refusal of `fused` itself
    kinds = {(tensor.device.type, tensor.dtype) for tensor in private.parameters_of(cell)}
    if not kinds <= _MEASURED:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        return f"auto: fused is measured in float32, float64 and bfloat16 on CPUs only, and this is {found}"
    half = torch.is_autocast_enabled("cpu") or ("cpu", torch.bfloat16) in kinds
    return _too_small(cell, xs, half or record_of(cell).in_pieces)


def _too_small(cell: nn.Module, xs: Streams, in_pieces: bool) -> str:
    """Why it does not pay to compile for a scan, or not yet; empty where it does."""
    steps, rows = size_of(xs)
    work = steps * rows * sum(parameter.numel() for parameter in private.parameters_of(cell))  # multiply-adds, about
    worth = _WORTH_COMPILING * _TIMES_MORE_WITHOUT_COMPILER
    if work < worth and not has_compiler():
        return f"auto: there is no C++ compiler, and without one the loop is faster below {worth:.0e} multiply-adds"
    times, what = (_TIMES_MORE_IN_PIECES, "its pieces") if in_pieces else (1, "it")
    if work >= times * _WORTH_COMPILING or record_of(cell).stepped >= times * _STEPS_BEFORE:
        return ""
    return f"auto: at {work:.1e} multiply-adds, compiling {what} pays after {times * _STEPS_BEFORE:,} steps by the loop"


def too_small_for_pieces(cell: nn.Module, xs: Streams, program: Program) -> str:
    """Why it does not pay to compile a program whose pieces are compiled one by one; empty where it does."""
    if program.is_native():
        return ""
    if any(buffer.dtype == torch.float64 for buffer in program.forward.buffers.values()):
        return "auto: in float64 fused is measured by native loops only, and this step has none"
    record_of(cell).in_pieces = True  # so that the next call knows it without the program
    return _too_small(cell, xs, in_pieces=True)
