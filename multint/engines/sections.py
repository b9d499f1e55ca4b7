"""The passes through a schedule: its steps, and what is before and after them, in both directions.

An executor runs the steps: native code (`native/loop.py`), or pieces one by one from Python (`pieces.py`). `replay` has
autograd run them, operation by operation, which is slow and needs no reverse section.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from multint.engines.pieces import by_columns, interpret
from multint.engines.schedule import At, Buffer, Contraction, Extent, Instruction, Memory, Product, RowSum, Schedule


class Executor(Protocol):
    """What runs the forward or the reverse section of a schedule, in blocks of steps."""

    def build(self) -> None:
        """Compile it. Raises: RefusedError where that cannot be done."""

    def allocate(
        self, names: Iterable[str], apart: Collection[str], cleared: Collection[str], steps: int, rows: int
    ) -> Memory:
        """Memory for what is made of some buffers, 0 where it is `cleared`. What is `apart` outlives the pass."""

    def blocks(self, steps: int, rows: int) -> list[range]:
        """The steps in blocks, before and after which there may be products for all their rows."""

    def over(self, memory: Memory, rows: int) -> Callable[[range], None]:
        """A function that runs some steps in the order given, on what the memory holds."""

    def gather(self, memory: Memory) -> None:
        """Bring together what is summed up in parts, after the last step."""

    def release(self, memory: Memory) -> None:
        """Let the next pass take the memory, but for what is `apart`."""


def run_forward(schedule: Schedule, executor: Executor, arguments: dict[str, Tensor], steps: int, rows: int) -> Memory:
    """The entry and the forward section: the arguments, all states, and what the backward pass reads."""
    made = [write.buffer for instruction in [*schedule.entry, *schedule.forward] for write in instruction.writes]
    memory: Memory = arguments | executor.allocate(dict.fromkeys(made), schedule.states[:1], (), steps, rows)
    for name in schedule.states:
        memory[name][0] = arguments[name]
    run = executor.over(memory, rows)
    for block in executor.blocks(steps, rows):
        _products(schedule.entry, schedule.buffers, memory, block)
        run(block)
    return memory


def run_backward(
    schedule: Schedule,
    executor: Executor,
    memory: Memory,
    cotangents: Sequence[Tensor | None],
    steps: int,
    rows: int,
) -> dict[str, Tensor]:
    """The reverse section, the exit and the epilogue: the gradients of the schedule's arguments.

    Args:
        memory: the arguments, and what `run_forward` has left of `schedule.kept`.
        cotangents: of the output and of each state after the last step.
    """
    buffers = schedule.buffers
    made = [write.buffer for instruction in schedule.reverse for write in instruction.writes]
    made += [instruction.result.buffer for instruction in schedule.exit if isinstance(instruction, Product)]
    made = list(dict.fromkeys([*made, *schedule.cleared]))
    memory |= executor.allocate(made, schedule.summands, schedule.cleared, steps, rows)
    d_output, *d_final = cotangents
    zeros = buffers[schedule.output_gradient].empty(rows, steps).zero_() if d_output is None else d_output
    memory[schedule.output_gradient] = zeros.contiguous()
    for state, given in zip(schedule.states, d_final, strict=True):
        for name in schedule.gradients[state]:
            memory[name][steps] = 0.0 if given is None else given
    run = executor.over(memory, rows)
    for block in reversed(executor.blocks(steps, rows)):
        run(block[::-1])
        _products(schedule.exit, buffers, memory, block)
    executor.gather(memory)
    for instruction in schedule.epilogue:
        assert isinstance(instruction, RowSum)
        memory[instruction.result.buffer] = memory[instruction.source.buffer].sum(0)
    found = {}
    for argument, names in schedule.gradients.items():
        if names:
            values = [memory[name][0] if buffers[name].extent is Extent.TURNS else memory[name] for name in names]
            found[argument] = reduce(torch.add, values).to(buffers[argument].dtype)
    executor.release(memory)
    return found


def _products(instructions: Sequence[Instruction], buffers: dict[str, Buffer], memory: Memory, block: range) -> None:
    """The products before or after a block of steps: each for the rows of all these steps at once."""

    def rows_of(at: At) -> Tensor:
        start = 0 if buffers[at.buffer].extent is Extent.BLOCK else block.start
        values: Tensor = memory[at.buffer][start : start + len(block)]
        return values.flatten(0, 1)

    for instruction in instructions:
        if isinstance(instruction, Product):
            matrix: Tensor = memory[instruction.matrix.buffer]
            matrix = matrix.t() if instruction.transposed else matrix
            matrix = by_columns(matrix) if matrix.dtype.itemsize == 2 else matrix
            torch.mm(rows_of(instruction.left), matrix, out=rows_of(instruction.result))
        elif isinstance(instruction, Contraction):
            name = instruction.result.buffer
            left, right = map(rows_of, instruction.reads)
            if name in memory:
                memory[name].addmm_(left.t(), right)
            else:
                memory[name] = torch.mm(left.t(), right)


def replay(schedule: Schedule, arguments: dict[str, Tensor], steps: int) -> list[Tensor]:
    """The output and each state after the last step, by autograd through the entry and the forward section."""
    state = [arguments[name] for name in schedule.states]
    rows = len(state[0])
    fixed = {At(n): v for n, v in arguments.items() if schedule.buffers[n].extent is Extent.ONE}
    streams = {n: v for n, v in arguments.items() if schedule.buffers[n].extent is Extent.EACH}
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
    return [torch.stack(outputs), *state]
