"""Running a program: what is before its loops by autograd, and the loops as one autograd function.

A scan that would keep too much for its backward pass is cut in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multint.engines import by_autograd, private
from multint.engines.by_autograd import have_gradients, interpret, reached
from multint.engines.program import Program
from multint.engines.schedule import At, Schedule
from multint.engines.sections import results_of, run_backward, run_forward
from multint.engines.tables import report
from multint.errors import EngineError, in_a_line

# Bytes of streams, products and states that a scan keeps for its backward pass. One that needs more is cut in time, and
# the backward pass computes each part again.
MEMORY_BUDGET = 2**30


def steps_at_a_time(program: Program, steps: int, rows: int) -> int:
    """How many steps' buffers fit the memory budget."""
    schedule = program.whole() if torch.is_grad_enabled() else program.forward
    return max(1, min(steps, MEMORY_BUDGET // max(1, rows * schedule.bytes_per_row)))


def run(
    program: Program, tensors: Sequence[Tensor], inputs: dict[str, Tensor], state: dict[str, Tensor], asked: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a program over all steps, in as many parts as the memory budget asks for.

    Gives the output, and the last values of the state's fields that a step changes.

    Args:
        tensors: the cell's, in the order of the schedule's `invariants`.
        inputs: the streams (T, B, ...) by name.
        state: all fields of the first state by the names of their buffers.
        asked: whether a failure of the backward pass is to be raised; else the gradients come by autograd.
    """
    schedule = program.forward
    known = dict(zip(schedule.invariants, tensors, strict=True)) | schedule.literals
    known |= {name: value for name, value in state.items() if name not in schedule.states}
    state = {name: state[name] for name in schedule.states}
    values = {At(name): value for name, value in known.items()}
    interpret(schedule.once, values)
    known = {at.buffer: value for at, value in values.items()}
    steps, rows = next(iter(inputs.values())).shape[:2]
    chunk = steps_at_a_time(program, steps, rows)
    if chunk == steps:
        return _run_part(program, known, inputs, state, asked)
    from torch.utils.checkpoint import checkpoint

    outputs = []
    parts = {name: x.split(chunk) for name, x in inputs.items()}
    for i in range(-(-steps // chunk)):
        part = {name: some[i] for name, some in parts.items()}
        output, state = checkpoint(
            _run_part, program, known, part, state, asked, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(output)
    return torch.cat(outputs), state


def _run_part(
    program: Program, known: dict[str, Tensor], inputs: dict[str, Tensor], state: dict[str, Tensor], asked: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a program: the products of the inputs first, then the loop. `known` is what is the same at every step."""
    schedule = program.forward
    steps, rows = next(iter(inputs.values())).shape[:2]
    streams = {schedule.inputs[name]: x for name, x in inputs.items()}
    if schedule.prologue:
        values = {At(name): value for name, value in known.items()}
        values |= {At(name, None): x.flatten(0, 1) for name, x in streams.items()}
        interpret(schedule.prologue, values)
        made = [write for instruction in schedule.prologue for write in instruction.writes]
        streams |= {write.buffer: values[write].unflatten(0, (steps, rows)) for write in made}
    given = known | streams | state
    arguments = {name: given[name] for name in schedule.arguments}
    # Kernels know nothing of strides. A matrix is brought into the order that its product wants there, and only there.
    arguments = {name: a if name in schedule.matrices else a.contiguous() for name, a in arguments.items()}
    learnt = [False] * (1 + len(state))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments.values()):
        wanted = frozenset(n for n, a in arguments.items() if a.requires_grad and n not in state)
        first = {name for name in schedule.states if state[name].requires_grad}
        learnt = have_gradients(program.reach, wanted, first, steps)
        if any(learnt):
            schedule = program.last = program.schedule(wanted)
    scan = _Scan(program, schedule, learnt, asked, steps, rows)
    output, *final = Scan.apply(scan, *arguments.values())  # type: ignore[no-untyped-call]
    return output, dict(zip(schedule.states, final, strict=True))


@dataclass(frozen=True)
class _Scan:
    """One run of a schedule's loops: all that it takes but tensors."""

    program: Program
    schedule: Schedule
    learnt: list[bool]  # whether the output, and each field of the last state, have a gradient
    asked: bool
    steps: int
    rows: int


class Scan(torch.autograd.Function):
    """(a run, the schedule's arguments) → (output, final state), as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, scan: _Scan, *arguments: Tensor) -> Any:
        schedule, steps, rows = scan.schedule, scan.steps, scan.rows
        executor = scan.program.executor(schedule, reverse=False)
        memory = run_forward(schedule, executor, dict(zip(schedule.arguments, arguments, strict=True)), steps, rows)
        ctx.scan = scan
        ctx.set_materialize_grads(False)
        if schedule.reverse:
            ctx.save_for_backward(*arguments, *(memory[name] for name in schedule.kept))
        # The last state stands in the buffer that the output is a view of, so it is given as a copy.
        output, *final = results_of(schedule, memory, steps)
        found = output, *(field.clone() for field in final)
        if not schedule.reverse:
            executor.release(memory)
        unlearnt = [value for value, learnt in zip(found, scan.learnt, strict=True) if not learnt]
        ctx.mark_non_differentiable(*unlearnt)
        return found

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        scan: _Scan = ctx.scan
        schedule = scan.schedule
        wanted = reached(scan.program.reach, [cotangent is not None for cotangent in cotangents], scan.steps)
        if not wanted:
            return None, *(None for _ in schedule.arguments)
        cotangents = tuple(None if c is None else private.in_memory(c) for c in cotangents)
        saved = [private.in_memory(tensor) for tensor in ctx.saved_tensors]
        count = len(schedule.arguments)
        arguments = dict(zip(schedule.arguments, saved[:count], strict=True))
        kept = dict(zip(schedule.kept, saved[count:], strict=True))
        # Hooks on saved tensors may have brought them into another order. That of a matrix is free.
        arguments = {name: a if name in schedule.matrices else a.contiguous() for name, a in arguments.items()}
        kept = {name: value.contiguous() for name, value in kept.items()}
        create_graph = torch.is_grad_enabled()
        # A gradient's gradient, or one of many at once.
        given = [cotangent for cotangent in cotangents if cotangent is not None]
        if create_graph or private.surroundings() or private.are_batched(*given):
            gradients = _differentiably(scan, arguments, cotangents, create_graph)
            return None, *(gradients.get(name) for name in schedule.arguments)
        try:
            with torch.autocast(given[0].device.type, enabled=False):
                executor = scan.program.executor(schedule, reverse=True)
                gradients = run_backward(schedule, executor, arguments | kept, cotangents, scan.steps, scan.rows)
        except Exception as error:
            # Where autograd fails too, the failure is the caller's: it is raised, and not kept.
            gradients = _differentiably(scan, arguments, cotangents, create_graph=False)
            reason = f"its backward pass failed by {in_a_line(error)}"
            scan.program.failure = f"fused: {reason}"
            if scan.asked:
                raise EngineError(scan.program.failure) from error
            report(reason)
        return None, *(gradients.get(name) if name in wanted else None for name in schedule.arguments)


def _differentiably(
    scan: _Scan, arguments: dict[str, Tensor], cotangents: Sequence[Tensor | None], create_graph: bool
) -> dict[str, Tensor]:
    """The same by autograd, through the forward section operation by operation; differentiable in its turn."""
    device = arguments[scan.schedule.states[0]].device.type
    # The saved arguments are still tied to the caller's graph. Views of them: where one depends on another, as a
    # carried state on the weights, each has its own gradient here.
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        of = {
            name: a.view_as(a) if create_graph else a.detach().requires_grad_(a.requires_grad)
            for name, a in arguments.items()
        }
        return by_autograd.gradients(scan.schedule, of, cotangents, scan.steps, create_graph)
