"""The passes through a schedule: its steps, and what is before and after them, in both directions.

An executor runs the forward or the reverse section in blocks of steps: as native code (`native/loop.py`), or by pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from multint.engines.native.loop import Loop
from multint.engines.schedule import At, Buffer, Call, Contraction, Extent, Instruction, Memory, Product, Schedule


class Pieces:
    """The executor by pieces: each step from Python, by its kernels and by products, on any device and in any dtype.

    It serves accelerators, bfloat16 and float16, and machines without a C++ compiler. No accelerator has run it so far.

    Args:
        eager: the kernels run op by op, and are not compiled.
    """

    def __init__(self, schedule: Schedule, reverse: bool, eager: bool = False) -> None:
        self._section = schedule.reverse if reverse else schedule.forward
        self._buffers, self._eager = schedule.buffers, eager

    def build(self) -> None:
        """Compile its kernels."""
        for instruction in self._section:
            if isinstance(instruction, Call):
                instruction.kernel.build()

    def allocate(
        self, names: Iterable[str], results: Collection[str], cleared: Collection[str], steps: int, rows: int
    ) -> Memory:
        """Memory for some buffers, 0 where it is `cleared`. The results outlive the pass; here all do."""
        some = [self._buffers[name] for name in names]
        return {buffer.name: buffer.allocate(buffer.sizes(rows, steps), buffer.name in cleared) for buffer in some}

    def release(self, memory: Memory) -> None:
        """Nothing is kept for the next pass."""

    def blocks(self, steps: int, rows: int) -> list[range]:
        """One block of all steps: the products before and after it are as large as they can be."""
        return [range(steps)]

    def over(self, memory: Memory, rows: int) -> Callable[[range], None]:
        """A function that runs the section for some steps, in the order given, on what the memory holds."""
        slots = {at: i for i, at in enumerate(dict.fromkeys(a for i in self._section for a in (*i.reads, *i.writes)))}
        fixed = [memory[at.buffer] for at in slots]
        some = [(i, self._buffers[at.buffer], at.later or 0) for at, i in slots.items()]
        moving = [(i, fixed[i], b, later) for i, b, later in some if b.extent not in (Extent.ONE, Extent.NOW)]
        calls = [self._call(instruction, slots, memory) for instruction in self._section]

        def run(order: range) -> None:
            values = list(fixed)
            # The views are made as they are needed: thousands of them alive at once set off Python's garbage
            # collector, which costs more than they do.
            for t in order:
                for slot, sequence, buffer, later in moving:
                    values[slot] = sequence[buffer.place(t + later)]
                for call, places in calls:
                    call(*[values[place] for place in places])

        return run

    def _call(
        self, instruction: Instruction, slots: dict[At, int], memory: Memory
    ) -> tuple[Callable[..., object], list[int]]:
        """An instruction as a function of the values in some slots."""
        if isinstance(instruction, Call):
            kernel = instruction.kernel
            places = [slots[at] for at in (*instruction.reads, *instruction.writes)]
            return kernel.eagerly if self._eager else kernel, places
        assert isinstance(instruction, Product)
        matrix = _matrix_of(instruction, memory)
        # Once for all steps: in float32 a product with a transposed matrix takes up to 1.4 times as long.
        matrix = matrix if matrix.dtype.itemsize == 2 else matrix.contiguous()
        adds = instruction.adds

        def multiply(left: Tensor, result: Tensor) -> None:
            if adds:
                result.addmm_(left, matrix)
            else:
                torch.mm(left, matrix, out=result)

        return multiply, [slots[instruction.left], slots[instruction.result]]


Executor: TypeAlias = Loop | Pieces


def run_forward(schedule: Schedule, executor: Executor, arguments: dict[str, Tensor], steps: int, rows: int) -> Memory:
    """The entry and the forward section: the arguments, all states, and what the backward pass reads."""
    memory: Memory = arguments | executor.allocate(schedule.made[0], schedule.states[:1], (), steps, rows)
    for name in schedule.states:
        memory[name][0] = arguments[name]
    run = executor.over(memory, rows)
    for block in executor.blocks(steps, rows):
        _products(schedule.entry, schedule.buffers, memory, block)
        run(block)
    return memory


def results_of(schedule: Schedule, memory: Memory, steps: int) -> list[Tensor]:
    """The output and each state after the last step, of what `run_forward` has left."""
    last = [memory[name][schedule.buffers[name].place(steps)] for name in schedule.states]
    return [memory[schedule.states[0]][1:], *last]


def run_backward(
    schedule: Schedule,
    executor: Executor,
    memory: Memory,
    cotangents: Sequence[Tensor | None],
    steps: int,
    rows: int,
) -> dict[str, Tensor]:
    """The reverse section and the exit: the gradients of the schedule's arguments.

    Args:
        memory: the arguments, and what `run_forward` has left of `schedule.kept`.
        cotangents: of the output and of each state after the last step.
    """
    buffers = schedule.buffers
    memory |= executor.allocate(schedule.made[1], schedule.summands, schedule.cleared, steps, rows)
    d_output, *d_final = cotangents
    if d_output is None:
        buffer = buffers[schedule.output_gradient]
        d_output = buffer.allocate(buffer.sizes(rows, steps), zero=True)
    memory[schedule.output_gradient] = d_output.contiguous()
    for state, given in zip(schedule.states, d_final, strict=True):
        for name in schedule.gradients[state]:
            memory[name][buffers[name].place(steps)] = 0.0 if given is None else given
    run = executor.over(memory, rows)
    for block in reversed(executor.blocks(steps, rows)):
        run(block[::-1])
        _products(schedule.exit, buffers, memory, block)
    found = {}
    for argument, names in schedule.gradients.items():
        values = [memory[name][0] if argument in schedule.states else memory[name] for name in names]
        if values:
            # A vector's may be there in parts: for each row, or for each thread.
            parts = [range(value.ndim - len(buffers[argument].sizes(rows, steps))) for value in values]
            values = [value.sum(tuple(dims)) if dims else value for value, dims in zip(values, parts, strict=True)]
            found[argument] = reduce(torch.add, values).to(buffers[argument].dtype)
    executor.release(memory)
    return found


def _products(instructions: Sequence[Instruction], buffers: dict[str, Buffer], memory: Memory, block: range) -> None:
    """The products before or after a block of steps: each for the rows of all these steps at once."""

    def rows_of(at: At) -> Tensor:
        start = 0 if buffers[at.buffer].extent is Extent.BLOCK else block.start
        return memory[at.buffer][start : start + len(block)].flatten(0, 1)

    for instruction in instructions:
        if isinstance(instruction, Product):
            torch.mm(rows_of(instruction.left), _matrix_of(instruction, memory), out=rows_of(instruction.result))
        elif isinstance(instruction, Contraction):
            name = instruction.result.buffer
            left, right = map(rows_of, instruction.reads)
            if name in memory:
                memory[name].addmm_(left.t(), right)
            else:
                memory[name] = torch.mm(left.t(), right)


def _matrix_of(product: Product, memory: Memory) -> Tensor:
    """A product's matrix; in half precision with the numbers of each column side by side, as a layer's weight has them.

    Where a processor has no instructions for half precision, torch multiplies row by row with any other matrix: by
    `timeit` of `torch.mm`, 32 × 256 by 256 × 1024 numbers of bfloat16 took 14.5 ms instead of 2.0 (one thread, AVX2).
    """
    matrix = memory[product.matrix.buffer]
    matrix = matrix.t() if product.transposed else matrix
    return matrix.t().contiguous().t() if matrix.dtype.itemsize == 2 else matrix
