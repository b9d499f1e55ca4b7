"""What a caller sees: one function that runs a cell over time, the choice of its engine, and the plan to be read."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from multint.engines import private
from multint.engines.failures import InternalError, StepError, report
from multint.engines.loop import loop
from multint.engines.machine import has_compiler
from multint.engines.traced import traced
from multint.errors import EngineError, OptionError, ShapeError, in_a_line

if TYPE_CHECKING:
    from multint.engines.program import Program

State = TypeVar("State", bound=tuple[Tensor, ...])
Streams = Tensor | dict[str, Tensor]

ENGINES = ("auto", "fused", "loop")

# Compiling a native loop takes about 5 s, and what it saves is mostly a step's overhead: .14 to .41 ms a step for both
# passes at H ≤ 128, with two threads (`python -m experiments bench --quick --rounds 7`). So `auto` compiles at once
# where a call is large, which repays it within some hundred calls or a thousand, and what is smaller after so many
# steps, which took the loop about as long as compiling.
_WORTH_COMPILING = 10**7  # multiply-adds of a forward pass
_STEPS_BEFORE = 20_000
# Where each piece is compiled by Inductor, which takes ten times as long; and where there is no compiler, so that
# pieces run op by op, which is slower than the loop at small sizes.
_TIMES_MORE_IN_PIECES, _TIMES_MORE_WITHOUT_COMPILER = 10, 100


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

    Where `xs` is a dict, the step gets a dict of the same keys with each stream at t. A program of torch.export holds
    the loop: unrolled, or as one operator where the length T is free. torch.compile unrolls the engine "loop" and
    leaves the others as they are, outside of what it compiles: long loops take it minutes.

    What the backward pass reads must not be overwritten before it, as for `nn.LSTM`, or autograd raises an error that
    names a version: the streams, the initial state, and the weights; by "fused" also the output, and a bias, which the
    loop's backward pass does not read.

    Args:
        engine: "loop", the Python loop, which runs everything; "fused", the compiled scan; or "auto": fused where it
            can take the cell and pays, on CPUs, else the loop. In float32 it is taken to pay from 1e7 multiply-adds on
            (T · B · the cell's parameters), and for a smaller scan when its cell has run 20,000 steps under "auto"; the
            two differ by rounding, in float32 by 1e-5 at most in the project's tests. In bfloat16, under autocast and
            for cells that have no native loop both numbers are ten times as large. Without a C++ compiler it takes 1e9
            multiply-adds. The loop runs a first state of another dtype than the step gives it, and all scans under
            anomaly detection. `explain` tells the choice and why.

    Raises: OptionError for an unknown engine; ShapeError for streams of no steps or of different lengths, for a state
    that is no named tuple, of another batch size, or of other dimensions than the cell's own, and for a step that gives
    it more rows or dimensions; EngineError where the engine asked for cannot run the cell, or the operator of an
    exported loop cannot hold its step. Errors of the step itself come as the loop raises them. "auto" raises no others.
    """
    _check(cell, xs, state, engine)
    if torch.compiler.is_exporting():
        return traced(cell, xs, state)
    return loop(cell, xs, state) if engine == "loop" else private.uncompiled(_choose, cell, xs, state, engine)


def _choose(cell: Any, xs: Streams, state: State, engine: str) -> tuple[Tensor, State]:
    cause: BaseException | None = None
    result = None
    try:
        reason = (_not_worth_it(cell, xs) if engine == "auto" else "") or _refusal(cell, xs, state)
        if not reason:
            return _fused(cell, xs, state, engine == "fused")
    except EngineError as error:
        reason, cause = str(error), error.__cause__
    except Exception as error:
        if private.is_control_flow(error):
            raise
        if isinstance(error, StepError):
            # The loop raises it itself, unless it comes of trying the step on other rows than these.
            cause = error.__cause__ or error
            reason = f"fused: the step fails when it is tried: {in_a_line(cause)}"
            if engine == "fused":
                loop(cell, xs, state)
        else:
            cause = error.__cause__ or error if isinstance(error, InternalError) else error
            reason = f"fused: it failed by {in_a_line(cause)}"
            result = loop(cell, xs, state)  # where this fails too, the failure is the caller's: it is not kept
            if isinstance(error, InternalError):
                error.keep(reason)
            if engine == "auto":
                report(f"it failed by {in_a_line(cause)}")
    if engine == "fused":
        raise EngineError(reason) from cause
    if isinstance(cell, nn.Module):
        record = _record(cell)
        record.last = _Told(reason)
        record.stepped += _size(xs)[0]
    return result or loop(cell, xs, state)


def _fused(cell: nn.Module, xs: Streams, state: State, asked: bool) -> tuple[Tensor, State]:
    from multint.engines import cache

    try:
        program, tensors = cache.program_of(cell, _by_name(xs), _at_a_step(xs), state, asked)
    except EngineError:
        _record(cell).stepped = 0  # a small scan is not tried again at every call
        raise
    given = [*_by_name(xs).values(), *state, *tensors]
    if torch.is_grad_enabled() and any(tensor.is_inference() for tensor in given):
        raise EngineError("fused: a tensor that was made in inference mode cannot be kept for a backward pass")
    reason = _first_state_differs(program, state) or ("" if asked else _too_small_for_pieces(cell, xs, program))
    if reason:
        raise EngineError(reason)
    try:
        result = _run(program, tensors, xs, state, asked)
    except Exception as error:
        if isinstance(error, EngineError) or private.is_control_flow(error):
            raise
        raise InternalError(partial(setattr, program, "failure")) from error
    _record(cell).last = _Told("", weakref.ref(program), _size(xs))
    return result


def _run(program: Program, tensors: list[Tensor], xs: Streams, state: State, asked: bool) -> tuple[Tensor, State]:
    from multint.engines.budget import run_in_parts
    from multint.engines.copies import as_state
    from multint.engines.executor import constants

    inputs, tensors, fields = (
        [private.in_memory(tensor) for tensor in some] for some in (_by_name(xs).values(), tensors, state)
    )
    # What follows has the casts of autocast in its graphs already.
    with torch.autocast(inputs[0].device.type, enabled=False):
        buffers = program.forward.buffers
        fields = [f.to(buffers[name].dtype) for f, name in zip(fields, program.forward.states, strict=True)]
        output, fields = run_in_parts(program, constants(program, tensors), inputs, fields, asked)
        return output, as_state(program.plan.state_type, fields)


def _first_state_differs(program: Program, state: Any) -> str:
    """Why the first state cannot be brought into the dtypes that the step gives it, in which all steps are run.

    A step may do other things with the same numbers in another dtype: `n > 1`, where n is 2 or True. Only the roundings
    of autocast come with the same numbers.
    """
    schedule = program.forward
    for name, shown, field in zip(schedule.states, state._fields, state, strict=True):
        dtype = schedule.buffers[name].dtype
        if field.dtype == dtype:
            continue
        floats = field.is_floating_point() and dtype.is_floating_point
        by_autocast = floats and torch.is_autocast_enabled(field.device.type)
        if not by_autocast or not torch.equal(field.detach().to(dtype).to(field.dtype), field.detach()):
            return f"fused: the first state's {shown} is {field.dtype}, and the step makes it {dtype}; start from that"
    return ""


def precompile(
    cell: Steppable[State],
    xs: Streams,  # (T, B, X), or several streams by name, of any T
    state: State | None = None,
) -> Explanation:
    """Compile what scans of such inputs by "fused" run, in both passes, and say how they run.

    Whatever T and B are later. Native loops are kept for the user's other processes too, in ~/.cache/multint/loops or
    the folder that MULTINT_CACHE_DIR names, so that a machine can be made ready before it is needed. The step is run;
    no gradient is left in the parameters.

    Raises: as `scan` does by "fused".
    """
    xs = {name: x[:1] for name, x in xs.items()} if isinstance(xs, dict) else xs[:1]
    if state is None:
        if not hasattr(cell, "initial_state"):
            raise OptionError(f"precompile: {type(cell).__name__} has no initial_state; a layer has its own precompile")
        state = cell.initial_state(_size(xs)[1])
    with torch.no_grad():
        scan(cell, xs, state, "fused")
    with torch.enable_grad():
        output, final = scan(cell, xs, state, "fused")
        results = [value for value in (output, *final) if value.requires_grad]
        leaves = [p for p in cell.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        if results and leaves:
            torch.autograd.grad(results, leaves, list(map(torch.ones_like, results)), allow_unused=True)
    return explain(cell)


@dataclass(frozen=True)
class Explanation:
    """How a scan runs: `engine`; where that is the loop, the `reason`; the `plan` of the step. Printed, all three."""

    engine: str
    reason: str
    _program: Program | None = None
    _size: tuple[int, int] = (0, 0)

    @property
    def plan(self) -> str:
        """The schedule of the step and the memory that it keeps; empty where the step was not traced."""
        if self._program is None:
            return ""
        from multint.engines.budget import steps_at_a_time
        from multint.engines.native import why_not

        (steps, rows), schedule = self._size, self._program.shown()
        chunk = steps_at_a_time(self._program, steps, rows)
        kept = chunk * rows * schedule.bytes_per_row / 2**20
        lines = [schedule.show(steps, rows), f"kept for the backward pass: {kept:.1f} MiB"]
        for title, section in (("forward", schedule.forward), ("backward", schedule.reverse)):
            if section:
                reverse = section is schedule.reverse
                reason = why_not(self._program, schedule, reverse)
                is_there = (id(schedule), reverse) in self._program.loops
                how = "native code" if is_there else "native code, once that is compiled"
                lines.append(f"run {title} by " + (f"Python, step by step: {reason}" if reason else how))
        if chunk < steps:
            lines.append(f"more would not fit the budget: {-(-steps // chunk)} parts of {chunk} steps, each run twice")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(line for line in (f"engine: {self.engine}", self.reason, self.plan) if line)


@dataclass(frozen=True)
class _Told:
    """What a cell's last scan did, without keeping its program alive."""

    reason: str
    program: weakref.ref[Program] | None = None
    size: tuple[int, int] = (0, 0)

    def explanation(self) -> Explanation:
        program = None if self.program is None else self.program()
        reason = program.failure if program else self.reason
        return Explanation("loop" if reason else "fused", reason, program, self.size)


@dataclass
class _Record:
    """What is kept of a cell: how its last scan ran, its steps by the loop so far, whether it has no native loops."""

    last: _Told | None = None
    stepped: int = 0
    in_pieces: bool = False


# By identity: what a user's cell says of equality and of its hash does not make two cells one.
_records: MutableMapping[nn.Module, _Record] = private.kept_by_identity()


def _record(cell: nn.Module) -> _Record:
    record = _records.get(cell)  # most calls find one, and to set one is slow
    if record is None:
        record = _records[cell] = _Record()
    return record


def explain(
    cell: Steppable[State],
    xs: Streams | None = None,  # (T, B, X), or several streams by name
    state: State | None = None,
    engine: str = "auto",
) -> Explanation:
    """Say how `scan(cell, xs, state, engine)` would run, and by what plan. Only the step is tried, on some rows.

    Without `xs`, say how the cell's last scan by "auto" or "fused" ran. `Recurrent.explain` does so for a layer.

    Raises: OptionError and ShapeError as `scan` does; OptionError for a cell that has not run.
    """
    if xs is None:
        last = _record(cell).last if isinstance(cell, nn.Module) else None
        if last is None:
            raise OptionError("explain: this cell or layer has not run by 'auto' or 'fused'")
        return last.explanation()
    if state is None:
        state = cell.initial_state(_size(xs)[1])  # type: ignore[attr-defined]
    _check(cell, xs, state, engine)
    if engine == "loop":
        return Explanation("loop", "asked for")
    from multint.engines import cache

    try:
        reason = _refusal(cell, xs, state)
        if reason or not isinstance(cell, nn.Module):
            return Explanation("loop", reason)
        program, _ = cache.program_of(cell, _by_name(xs), _at_a_step(xs), state, asked=True)
    except Exception as error:
        failed = error.__cause__ if isinstance(error, StepError | InternalError) and error.__cause__ else error
        return Explanation("loop", str(error) if isinstance(error, EngineError) else f"fused: {in_a_line(failed)}")
    reason = _first_state_differs(program, state) or (_not_worth_it(cell, xs) if engine == "auto" else "")
    if engine == "auto" and not reason:
        reason = _too_small_for_pieces(cell, xs, program)
    return Explanation("loop" if reason else "fused", reason, program, _size(xs))


def _refusal(cell: Any, xs: Streams, state: Any) -> str:
    """Why `fused` cannot be tried, apart from what tracing would find; empty where nothing speaks against it."""
    if not isinstance(cell, nn.Module):
        return "fused: the cell is no nn.Module, so its parameters are unknown"
    if not _is_listed(cell):
        return "fused: a module of the cell has no hash, so torch cannot list its parameters"
    if private.global_hooks():
        return "fused: there are hooks on all modules, which would not be called at every step"
    if around := private.surroundings():
        return f"fused: {around}"
    given = [*_by_name(xs).values(), *state]
    if len({tensor.shape[:1] for tensor in state} | {stream.shape[1:2] for stream in _by_name(xs).values()}) > 1:
        return "fused: the streams have different numbers of rows"
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in given):
        return f"fused: it takes plain tensors, and not {', '.join(sorted({type(t).__name__ for t in given}))}"
    if layouts := {str(tensor.layout) for tensor in given if tensor.layout is not torch.strided}:
        return f"fused: it takes tensors of the layout torch.strided, and not {', '.join(sorted(layouts))}"
    if any(tensor.is_meta for tensor in given):
        return "fused: tensors on the meta device hold no numbers to check the step by"
    if _size(xs)[1] == 0:
        return "fused: there are no rows"
    return ""


def _is_listed(cell: nn.Module) -> bool:
    """Whether torch can list the cell's modules, which takes the hash of each."""
    try:
        return bool(list(cell.modules()))
    except Exception:
        return False


def _not_worth_it(cell: Any, xs: Streams) -> str:
    """Why `auto` does not try `fused`; empty where it does."""
    if _size(xs)[0] == 1:
        return "auto: one step is no loop"
    if not isinstance(cell, nn.Module) or not _is_listed(cell):
        return ""  # which is a refusal of `fused` itself
    kinds = {(tensor.device.type, tensor.dtype) for tensor in cell.parameters()}
    if not kinds <= {("cpu", torch.float32), ("cpu", torch.bfloat16)}:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        return f"auto: fused is measured in float32 and bfloat16 on CPUs only, and this is {found}"
    worth = _WORTH_COMPILING * _TIMES_MORE_WITHOUT_COMPILER
    if _work(cell, xs) < worth and not has_compiler():
        return f"auto: there is no C++ compiler, and without one the loop is faster below {worth:.0e} multiply-adds"
    half = torch.is_autocast_enabled("cpu") or ("cpu", torch.bfloat16) in kinds
    return _too_small(cell, xs, half or _record(cell).in_pieces)


def _too_small(cell: nn.Module, xs: Streams, in_pieces: bool) -> str:
    """Why it does not pay to compile for a scan, or not yet; empty where it does."""
    work, times = _work(cell, xs), _TIMES_MORE_IN_PIECES if in_pieces else 1
    if work >= times * _WORTH_COMPILING or _record(cell).stepped >= times * _STEPS_BEFORE:
        return ""
    what = "its pieces" if in_pieces else "it"
    return f"auto: at {work:.1e} multiply-adds, compiling {what} pays after {times * _STEPS_BEFORE:,} steps by the loop"


def _work(cell: nn.Module, xs: Streams) -> int:
    """About the multiply-adds of a forward pass."""
    steps, rows = _size(xs)
    return steps * rows * sum(parameter.numel() for parameter in cell.parameters())


def _too_small_for_pieces(cell: nn.Module, xs: Streams, program: Program) -> str:
    """Why it does not pay to compile a program whose pieces are compiled one by one; empty where it does."""
    if _is_native(program):
        return ""
    _record(cell).in_pieces = True  # so that the next call knows it without the program
    return _too_small(cell, xs, in_pieces=True)


def _is_native(program: Program) -> bool:
    """Whether a program's loops are native, or would be when they are compiled."""
    from multint.engines.kernel import compiles
    from multint.engines.native import why_not

    if not compiles():  # for now
        return False
    if program.is_native is None:
        schedule = program.whole()
        sections = [False, True] if schedule.reverse else [False]
        program.is_native = not any(why_not(program, schedule, reverse) for reverse in sections)
    return program.is_native


def _by_name(xs: Streams) -> dict[str, Tensor]:
    return xs if isinstance(xs, dict) else {"x": xs}


def _at_a_step(xs: Streams) -> Any:
    """The streams as the first step gets them."""
    return {name: stream[0] for name, stream in xs.items()} if isinstance(xs, dict) else xs[0]


def _size(xs: Streams) -> tuple[int, int]:
    shapes = [stream.shape for stream in _by_name(xs).values()]
    # A stream of one row may meet the rows of the others, whichever comes first.
    return shapes[0][0], max(shape[1] for shape in shapes if len(shape) > 1)


def _check(cell: Any, xs: Streams, state: Any, engine: str) -> None:
    if engine not in ENGINES:
        raise OptionError(f"scan: engine is {engine!r}, expected one of {', '.join(map(repr, ENGINES))}")
    streams = _by_name(xs)
    if all(stream.ndim < 2 for stream in streams.values()):
        raise ShapeError(f"scan: xs has {max(s.ndim for s in streams.values())} dimensions, expected (T, B, ...)")
    lengths = [stream.shape[0] for stream in streams.values()]
    # Compared one by one: in a traced program a length may be a symbol, which no set takes.
    if any(length != lengths[0] for length in lengths) or lengths[0] == 0:
        shown = sorted(set(lengths))
        raise ShapeError(f"scan: xs has the lengths {shown} in time, expected one length of at least 1")
    if not (isinstance(state, tuple) and hasattr(state, "_fields")):
        raise ShapeError(f"scan: state is a {type(state).__name__}, expected a named tuple of tensors (B, ...)")
    _, rows = _size(xs)
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
