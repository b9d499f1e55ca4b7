"""Running a schedule: what is before its loops by autograd, and the loops as one autograd function.

A loop is run by native code (`native.py`) where it has one, else step by step in Python (`stepwise.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multint.engines import private
from multint.engines.failures import report
from multint.engines.native import loop_of
from multint.engines.program import Program
from multint.engines.reach import Path
from multint.engines.schedule import At, Buffer, Contraction, Extent, Instruction, Product, Schedule, Sum
from multint.engines.stepwise import Memory, allocate, execute, interpret
from multint.errors import EngineError, in_a_line


def constants(program: Program, tensors: Sequence[Tensor]) -> dict[At, Tensor]:
    """What is computed of the cell's tensors, once a call, and what the step makes of numbers in its code."""
    plan, schedule = program.plan, program.forward
    names = [name for name, buffer in schedule.buffers.items() if buffer.given and buffer.extent is Extent.ONE]
    values = dict(zip(map(At, names), [*tensors, *plan.literals.values()], strict=True))
    interpret(schedule.prelude, values)
    return values


def run(
    program: Program, known: dict[At, Tensor], inputs: Sequence[Tensor], state: Sequence[Tensor], asked: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run a program: the products of the inputs (T, B, ...) first, then the loop.

    Args:
        known: the `constants`.
        asked: whether a failure of the backward pass is to be raised; else the gradients come by autograd.
    """
    plan, schedule = program.plan, program.forward
    steps, rows = inputs[0].shape[:2]
    streams = dict(zip(schedule.inputs, inputs, strict=True))
    if schedule.prologue:
        values = known | {At(name, None): x.flatten(0, 1) for name, x in streams.items()}
        interpret(schedule.prologue, values)
        made = [write for instruction in schedule.prologue for write in instruction.writes]
        streams |= {write.buffer: values[write].unflatten(0, (steps, rows)) for write in made}
    by_step = len(plan.streams) + len(plan.lefts)
    changing = [streams[name].contiguous() for name in schedule.arguments[:by_step]]
    same = [known[At(name)] for name in schedule.arguments[by_step : -len(state)]]
    # Kernels know nothing of strides. A matrix is brought into the order that its product wants there, and only there.
    count = len(plan.matrices)
    matrices, vectors = same[:count], [value.contiguous() for value in same[count:]]
    arguments = [*changing, *matrices, *vectors, *state]
    wanted = path = None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments):
        named = zip(schedule.arguments, arguments, strict=True)
        learnt = frozenset(name for name, tensor in named if tensor.requires_grad and name not in schedule.states)
        path = program.reach(learnt).path(tuple(field.requires_grad for field in state), steps)
        wanted = learnt if any(path.results) else None
    output, *final = Scan.apply(program, wanted, path, asked, steps, *arguments)  # type: ignore[no-untyped-call]
    return output, final


_BESIDE = 5  # what `Scan` takes beside the schedule's arguments


class Scan(torch.autograd.Function):
    """(arguments of the schedule) → (output, final state), as one operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        program: Program,
        wanted: frozenset[str] | None,
        path: Path | None,
        asked: bool,
        steps: int,
        *arguments: Tensor,
    ) -> Any:
        schedule = program.scheduled(wanted)
        buffers, rows = schedule.buffers, len(arguments[-1])
        memory: Memory = dict(zip(schedule.arguments, arguments, strict=True))
        loop = loop_of(program, schedule, reverse=False)
        made = [write.buffer for instruction in [*schedule.entry, *schedule.forward] for write in instruction.writes]
        allocated = loop.allocate if loop else partial(allocate, buffers)
        memory |= allocated(dict.fromkeys(made), schedule.states[:1], (), steps, rows)
        for name, first in zip(schedule.states, arguments[-len(schedule.states) :], strict=True):
            # Where two values take turns, this one is written over.
            memory[name][0] = first.clone() if buffers[name].extent is Extent.TURNS else first
        run = loop.over(memory, rows) if loop else partial(execute, schedule.forward, buffers, memory, rows=rows)
        for block in loop.blocks(steps, rows) if loop else [range(steps)]:
            _products(schedule.entry, buffers, memory, block)
            run(block)
        if loop:
            loop.gather(memory)
        ctx.program, ctx.schedule, ctx.path, ctx.asked, ctx.steps = program, schedule, path, asked, steps
        ctx.set_materialize_grads(False)
        if schedule.reverse:
            kept = [memory[name] if isinstance(memory[name], list) else [memory[name]] for name in schedule.kept]
            ctx.counts = [len(memory[name]) if isinstance(memory[name], list) else None for name in schedule.kept]
            ctx.save_for_backward(*arguments, *(tensor for some in kept for tensor in some))
        # The last state stands in the buffer that the output is a view of, so it is given as a copy.
        final = [memory[name][steps].clone() for name in schedule.states]
        if loop and not schedule.reverse:
            loop.release(memory)
        results = memory[schedule.states[0]][1:], *final
        if path is not None:
            ctx.mark_non_differentiable(*(r for r, learnt in zip(results, path.results, strict=True) if not learnt))
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        schedule: Schedule = ctx.schedule
        reached = ctx.path.arguments([cotangent is not None for cotangent in cotangents])
        if not reached:
            return (None,) * (_BESIDE + len(schedule.arguments))
        cotangents = tuple(None if c is None else private.in_memory(c) for c in cotangents)
        saved = [private.in_memory(tensor) for tensor in ctx.saved_tensors]
        arguments, saved = saved[: len(schedule.arguments)], saved[len(schedule.arguments) :]
        # Hooks on saved tensors may have brought them into another order. That of a matrix is free.
        saved = [tensor.contiguous() for tensor in saved]
        named = zip(schedule.arguments, arguments, strict=True)
        arguments = [a if schedule.buffers[n].extent is Extent.ONE else a.contiguous() for n, a in named]
        create_graph = torch.is_grad_enabled()
        # A gradient's gradient, or one of many at once.
        given = [cotangent for cotangent in cotangents if cotangent is not None]
        if create_graph or private.surroundings() or private.are_batched(*given):
            gradients = _differentiably(schedule, arguments, cotangents, ctx.steps, create_graph)
            return *(None,) * _BESIDE, *gradients
        memory: Memory = dict(zip(schedule.arguments, arguments, strict=True))
        for name, count in zip(schedule.kept, ctx.counts, strict=True):
            memory[name], saved = (saved[0], saved[1:]) if count is None else (saved[:count], saved[count:])
        try:
            with torch.autocast(given[0].device.type, enabled=False):
                gradients = _backward(ctx.program, schedule, memory, cotangents, ctx.steps, len(arguments[-1]))
        except Exception as error:
            # Where autograd fails too, the failure is the caller's: it is raised, and not kept.
            gradients = _differentiably(schedule, arguments, cotangents, ctx.steps, create_graph=False)
            reason = f"its backward pass failed by {in_a_line(error)}"
            ctx.program.failure = f"fused: {reason}"
            if ctx.asked:
                raise EngineError(ctx.program.failure) from error
            report(reason)
        found = [gradient if n in reached else None for n, gradient in zip(schedule.arguments, gradients, strict=True)]
        return *(None,) * _BESIDE, *found


def _backward(
    program: Program, schedule: Schedule, memory: Memory, cotangents: Sequence[Tensor | None], steps: int, rows: int
) -> list[Tensor | None]:
    """The reverse loop and the epilogue: the gradients of the schedule's arguments."""
    loop = loop_of(program, schedule, reverse=True)
    buffers = schedule.buffers
    made = [write.buffer for instruction in schedule.reverse for write in instruction.writes]
    made += [instruction.result.buffer for instruction in schedule.exit if isinstance(instruction, Product)]
    allocated = loop.allocate if loop else partial(allocate, buffers)
    memory |= allocated(dict.fromkeys([*made, *schedule.cleared]), schedule.gradients, schedule.cleared, steps, rows)
    d_output, *d_final = cotangents
    zeros = buffers[schedule.output_gradient].empty(rows, steps).zero_() if d_output is None else d_output
    memory[schedule.output_gradient] = zeros.contiguous()
    for d_state, given in zip(schedule.gradients[-len(schedule.states) :], d_final, strict=True):
        if d_state is not None:
            zeros = buffers[d_state].empty(rows).zero_() if given is None else given
            memory[d_state][steps] = zeros.clone(memory_format=torch.contiguous_format)  # since it is written over
    if loop:
        # What a forward loop from Python has left for each step by itself.
        memory |= {name: torch.stack(value) for name, value in memory.items() if isinstance(value, list)}
    run = loop.over(memory, rows) if loop else partial(execute, schedule.reverse, buffers, memory, rows=rows)
    for block in reversed(loop.blocks(steps, rows) if loop else [range(steps)]):
        run(block[::-1])
        _products(schedule.exit, buffers, memory, block)
    if loop:
        loop.gather(memory)
    for instruction in schedule.epilogue:
        assert isinstance(instruction, Sum)
        memory[instruction.result.buffer] = memory[instruction.source.buffer].sum(0)
    found = []
    for argument, gradient in zip(schedule.arguments, schedule.gradients, strict=True):
        value = None
        if gradient is not None:
            carried = buffers[gradient].extent is Extent.TURNS
            value = (memory[gradient][0] if carried else memory[gradient]).to(buffers[argument].dtype)
        found.append(value)
    if loop:
        loop.release(memory)
    return found


def _products(instructions: Sequence[Instruction], buffers: dict[str, Buffer], memory: Memory, block: range) -> None:
    """The products before or after a block of steps: each for the rows of all these steps at once."""

    def rows_of(at: At) -> Tensor:
        values, start = memory[at.buffer], 0 if buffers[at.buffer].extent is Extent.BLOCK else block.start
        values = values[start : start + len(block)]
        return (torch.stack(values) if isinstance(values, list) else values).flatten(0, 1)

    for instruction in instructions:
        if isinstance(instruction, Product):
            matrix: Tensor = memory[instruction.matrix.buffer]
            matrix = matrix.t() if instruction.transposed else matrix
            torch.mm(rows_of(instruction.left), matrix, out=rows_of(instruction.result))
        elif isinstance(instruction, Contraction):
            name = instruction.result.buffer
            left, right = map(rows_of, instruction.reads)
            if name in memory:
                memory[name].addmm_(left.t(), right)
            else:
                memory[name] = torch.mm(left.t(), right)


def _differentiably(
    schedule: Schedule, arguments: list[Tensor], cotangents: Sequence[Tensor | None], steps: int, create_graph: bool
) -> list[Tensor | None]:
    """The same by autograd, through the forward section operation by operation; differentiable in its turn."""
    # The saved arguments are still tied to the caller's graph. Views of them: where one depends on another, as a
    # carried state on the weights, each has its own gradient here. A name that stands twice has one view.
    with torch.enable_grad(), torch.autocast(arguments[-1].device.type, enabled=False):
        of = {
            name: a.view_as(a) if create_graph else a.detach().requires_grad_(a.requires_grad)
            for name, a in zip(schedule.arguments, arguments, strict=True)
        }
        state = [of[name] for name in schedule.states]
        fixed = {At(n): v for n, v in of.items() if schedule.buffers[n].extent is Extent.ONE}
        streams = {n: v for n, v in of.items() if schedule.buffers[n].extent is Extent.EACH}
        rows = len(arguments[-1])
        values = fixed | {At(name, None): stream.flatten(0, 1) for name, stream in streams.items()}
        interpret(schedule.entry, values)
        made = [write for instruction in schedule.entry for write in instruction.writes]
        streams |= {at.buffer: values[at].unflatten(0, (steps, rows)) for at in made}
        outputs = []
        for t in range(steps):
            values = fixed | {At(name): stream[t] for name, stream in streams.items()}
            values |= {At(name): value for name, value in zip(schedule.states, state, strict=True)}
            interpret(schedule.forward, values)
            state = [values[At(name, 1)] for name in schedule.states]
            outputs.append(state[0])
        wanted = {name: value for name, value in of.items() if value.requires_grad}
        pairs = zip((torch.stack(outputs), *state), cotangents, strict=True)
        results, given = zip(*((result, given) for result, given in pairs if given is not None), strict=True)
        gradients = torch.autograd.grad(
            results, list(wanted.values()), given, create_graph=create_graph, allow_unused=True
        )
    found = dict(zip(wanted, gradients, strict=True))
    return [found.pop(name, None) for name in schedule.arguments]
