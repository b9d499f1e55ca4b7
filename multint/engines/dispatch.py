"""The scan that a caller sees: the engine that is asked for, or the choice of one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multint.engines import private
from multint.engines.checks import (
    State,
    Steppable,
    Streams,
    at_a_step,
    check,
    first_state_differs,
    not_worth_it,
    size_of,
    streams_by_name,
    too_small_for_pieces,
    why_not_fused,
)
from multint.engines.failures import FailedError, StepError
from multint.engines.loop import loop
from multint.engines.tables import Last, record_of, report
from multint.errors import EngineError

if TYPE_CHECKING:
    from multint.engines.program import Program


def scan(
    cell: Steppable[State],
    xs: Streams,  # (T, B, X), or several streams by name, each (T, B, ...)
    state: State,  # of tensors (B, ...)
    engine: str = "auto",
) -> tuple[Tensor, State]:  # (T, B, H), and the state after step T
    """Run `state = cell.step(xs[t], state)` for t = 0 … T−1 and collect the first field of every state.

    Where `xs` is a dict, the step gets a dict of the same keys with each stream at t. A program of torch.export holds
    the loop: unrolled, or as one operator where the length T is free. torch.compile unrolls the engine "loop" and
    leaves the others as they are, outside of what it compiles: long loops take it minutes. Of a scan within a step of
    another one, `fused` reads the loop, unrolled, by whatever engine.

    What the backward pass reads must not be overwritten before it, as for `nn.LSTM`, or autograd raises an error that
    names a version: the streams, the initial state, and the weights; by "fused" also the output, and a bias, which the
    loop's backward pass does not read.

    Args:
        engine: "loop", the Python loop, which runs everything; "fused", the compiled scan; or "auto": fused where it
            can take the cell and pays, on CPUs, else the loop. In float32 and float64 it is taken to pay from 1e7
            multiply-adds on (T · B · the cell's parameters), and for a smaller scan when its cell has run 20,000 steps
            under "auto"; the two differ by rounding, in float32 by 1e-5 at most in the project's tests. In bfloat16,
            under autocast and for cells that have no native loop both numbers are ten times as large, without a C++
            compiler 1e9 multiply-adds; in float64 such cells take the loop. The loop runs a first state of another
            dtype than the step gives it, and all scans under anomaly detection. `explain` tells the choice and why.

    Raises: OptionError for an unknown engine; ShapeError for streams of no steps or of different lengths, for a state
    that is no named tuple, of another batch size, or of other dimensions than the cell's own, and for a step that gives
    it more rows or dimensions; EngineError where the engine asked for cannot run the cell, or the operator of an
    exported loop cannot hold its step. Errors of the step itself come as the loop raises them. "auto" raises no others.
    """
    check(cell, xs, state, engine)
    if torch.compiler.is_exporting():
        return _exported(cell, xs, state)
    if engine == "loop" or private.is_read_in_a_step():
        return loop(cell, xs, state)
    return private.uncompiled(_choose, cell, xs, state, engine)


def _choose(cell: Any, xs: Streams, state: State, engine: str) -> tuple[Tensor, State]:
    failed: FailedError | None = None
    try:
        reason = (not_worth_it(cell, xs) if engine == "auto" else "") or why_not_fused(cell, xs, state)
        if not reason:
            return _fused(cell, xs, state, engine == "fused")
        cause = None
    except EngineError as error:
        reason, cause = str(error), error.__cause__
    except Exception as error:
        if private.is_control_flow(error):
            raise
        failed = error if isinstance(error, FailedError) else FailedError(error)
        reason, cause = str(failed), failed.cause
    result = None
    if failed is not None:
        # Where the loop fails too, the failure is the caller's: it is not kept. By name it only shows that: a step that
        # writes to what it is given must leave that as it was.
        given = (xs, state) if engine == "auto" else _copied(xs, state)
        result = loop(cell, *given)
        if failed.owner is not None:
            failed.owner.failure = reason
        if engine == "auto" and not isinstance(failed, StepError):
            report(reason.removeprefix("fused: "))
    if engine == "fused":
        raise EngineError(reason) from cause
    if isinstance(cell, nn.Module):
        record = record_of(cell)
        record.last = Last(reason)
        record.stepped += size_of(xs)[0]
    failed = cause = None  # whose tracebacks have this frame, and so the result
    return result or loop(cell, xs, state)


def _copied(xs: Streams, state: State) -> tuple[Streams, State]:
    streams = {name: x.clone() for name, x in xs.items()} if isinstance(xs, dict) else xs.clone()
    return streams, type(state)(*(field.clone() for field in state))


def _fused(cell: nn.Module, xs: Streams, state: State, by_name: bool) -> tuple[Tensor, State]:
    from multint.engines.program import program_of

    record = record_of(cell)
    try:
        program, tensors = program_of(cell, at_a_step(xs), state, by_name)
    except EngineError:
        record.stepped = 0  # a small scan is not tried again at every call
        raise
    if reason := first_state_differs(program, state) or ("" if by_name else too_small_for_pieces(cell, xs, program)):
        raise EngineError(reason)
    try:
        result = _run(program, tensors, xs, state, by_name)
    except Exception as error:
        if isinstance(error, EngineError) or private.is_control_flow(error):
            raise
        raise FailedError(error, program) from error
    record.last = Last("", weakref.ref(program), size_of(xs))
    return result


def _run(program: Program, tensors: list[Tensor], xs: Streams, state: State, by_name: bool) -> tuple[Tensor, State]:
    from multint.engines.run import run
    from multint.engines.step import as_state

    inputs, schedule = streams_by_name(xs), program.forward
    if torch.is_grad_enabled() and any(tensor.is_inference() for tensor in (*inputs.values(), *state, *tensors)):
        raise EngineError("fused: a tensor that was made in inference mode cannot be kept for a backward pass")
    inputs = {name: private.in_memory(x) for name, x in inputs.items()}
    first = {name: private.in_memory(field) for name, field in zip(schedule.fields, state, strict=True)}
    # What follows has the casts of autocast in its graphs already.
    with torch.autocast(state[0].device.type, enabled=False):
        first = {name: field.to(schedule.buffers[name].dtype) for name, field in first.items()}
        output, last = run(program, list(map(private.in_memory, tensors)), inputs, first, by_name)
        return output, as_state(program.plan.state_type, list((first | last).values()))


def _exported(cell: Any, xs: Any, state: Any) -> tuple[Tensor, Any]:
    """The loop's result, by operations that a program can hold.

    A fixed length is unrolled. One that `torch.export` is told to leave free becomes torch's operator `scan`, in its
    default, non-strict mode.

    Raises: EngineError for a step that the operator cannot hold.
    """
    if not isinstance(size_of(xs)[0], torch.SymInt):
        return loop(cell, xs, state)
    try:
        return private.scan_operator(cell.step, xs, state)
    except Exception as error:
        raise EngineError(
            "scan: the step cannot be exported with a free length, expected one that is fixed, or a step that torch's "
            f"operator `scan` takes: {private.explanation_in(error)}"
        ) from error
