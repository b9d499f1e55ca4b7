"""The scan that a caller sees: the engine that is asked for, or the choice of one."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multint.engines import private
from multint.engines.checks import (
    State,
    Steppable,
    Streams,
    at_a_step,
    by_name,
    check,
    first_state_differs,
    size_of,
    why_not_fused,
)
from multint.engines.failures import InternalError, StepError
from multint.engines.loop import loop
from multint.engines.tables import Last, record_of, report
from multint.engines.worth import not_worth_it, too_small_for_pieces
from multint.errors import EngineError, in_a_line

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
    cause: BaseException | None = None
    result = None
    try:
        reason = (not_worth_it(cell, xs) if engine == "auto" else "") or why_not_fused(cell, xs, state)
        if not reason:
            return _fused(cell, xs, state, engine == "fused")
    except EngineError as error:
        reason, cause = str(error), error.__cause__
    except Exception as error:
        if private.is_control_flow(error):
            raise
        if isinstance(error, StepError):
            # The loop raises it itself, unless it comes of the tracer, or of other rows than these.
            cause = error.__cause__ or error
            reason = f"fused: the step fails when it is traced: {in_a_line(cause)}"
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
        record = record_of(cell)
        record.last = Last(reason)
        record.stepped += size_of(xs)[0]
    return result or loop(cell, xs, state)


def _fused(cell: nn.Module, xs: Streams, state: State, asked: bool) -> tuple[Tensor, State]:
    from multint.engines.program import program_of

    try:
        program, tensors = program_of(cell, at_a_step(xs), state, asked)
    except EngineError:
        record_of(cell).stepped = 0  # a small scan is not tried again at every call
        raise
    given = [*by_name(xs).values(), *state, *tensors]
    if torch.is_grad_enabled() and any(tensor.is_inference() for tensor in given):
        raise EngineError("fused: a tensor that was made in inference mode cannot be kept for a backward pass")
    reason = first_state_differs(program, state) or ("" if asked else too_small_for_pieces(cell, xs, program))
    if reason:
        raise EngineError(reason)
    try:
        result = _run(program, tensors, xs, state, asked)
    except Exception as error:
        if isinstance(error, EngineError) or private.is_control_flow(error):
            raise
        raise InternalError(partial(setattr, program, "failure")) from error
    record_of(cell).last = Last("", weakref.ref(program), size_of(xs))
    return result


def _run(program: Program, tensors: list[Tensor], xs: Streams, state: State, asked: bool) -> tuple[Tensor, State]:
    from multint.engines.run import run
    from multint.engines.step import as_state

    inputs = {name: private.in_memory(x) for name, x in by_name(xs).items()}
    tensors, fields = ([private.in_memory(tensor) for tensor in some] for some in (tensors, state))
    # What follows has the casts of autocast in its graphs already.
    with torch.autocast(fields[0].device.type, enabled=False):
        buffers = program.forward.buffers
        first = {n: f.to(buffers[n].dtype) for n, f in zip(program.forward.fields, fields, strict=True)}
        output, last = run(program, tensors, inputs, first, asked)
        return output, as_state(program.plan.state_type, list((first | last).values()))


def _exported(cell: Any, xs: Any, state: Any) -> tuple[Tensor, Any]:
    """The loop's result, by operations that a program can hold.

    A fixed length is unrolled. One that `torch.export` is told to leave free becomes torch's operator `scan`, in its
    default, non-strict mode.

    Raises: EngineError for a step that the operator cannot hold.
    """
    steps = (next(iter(xs.values())) if isinstance(xs, dict) else xs).shape[0]
    if not private.is_free(steps):
        return loop(cell, xs, state)
    try:
        return private.scan_operator(cell.step, xs, state)
    except Exception as error:
        raise EngineError(
            "scan: the step cannot be exported with a free length, expected one that is fixed, or a step that torch's "
            f"operator `scan` takes: {_told_by(error)}"
        ) from error


def _told_by(error: Exception) -> str:
    """What an error of torch's tracer says, without its advice and its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    explained = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    return explained[0] if explained else lines[0]
