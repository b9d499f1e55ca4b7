"""The executor by pieces: each step from Python, on any device and in any dtype.

It serves accelerators, bfloat16 and float16, and machines without a C++ compiler. No accelerator has run it so far.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from multint.engines.schedule import At, Call, Extent, Instruction, Memory, Product, Schedule, Turns


class Pieces:
    """The forward or the reverse section of a schedule, by its kernels and by products, each into its buffer.

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
        self, names: Iterable[str], apart: Collection[str], cleared: Collection[str], steps: int, rows: int
    ) -> Memory:
        """Memory for what is made of some buffers, which is 0 where it is `cleared`. All of it is `apart` here."""
        counts = {Extent.EACH: steps, Extent.BLOCK: steps, Extent.STATES: steps + 1, Extent.TURNS: 2}
        found: Memory = {}
        for name in names:
            buffer = self._buffers[name]
            if name in cleared:
                # Only the last step's entry of a state's gradient is written then; the rest stay 0.
                takes_turns = buffer.extent is Extent.TURNS
                found[name] = buffer.empty(rows, steps + 1 if takes_turns else counts.get(buffer.extent)).zero_()
            else:
                made = buffer.empty(rows, counts.get(buffer.extent))
                found[name] = Turns(made) if buffer.extent is Extent.TURNS else made
        return found

    def blocks(self, steps: int, rows: int) -> list[range]:
        """One block of all steps: the products before and after it are as large as they can be."""
        return [range(steps)]

    def over(self, memory: Memory, rows: int) -> Callable[[range], None]:
        """A function that runs the section for some steps, in the order given, on what the memory holds."""
        slots = {at: i for i, at in enumerate(dict.fromkeys(a for i in self._section for a in (*i.reads, *i.writes)))}
        fixed = [memory[at.buffer] for at in slots]
        once = (Extent.ONE, Extent.NOW)
        moving = [
            (i, fixed[i], at.later or 0) for at, i in slots.items() if self._buffers[at.buffer].extent not in once
        ]
        calls = [self._call(instruction, slots, memory) for instruction in self._section]

        def run(order: range) -> None:
            values = list(fixed)
            # The views are made as they are needed: thousands of them alive at once set off Python's garbage
            # collector, which costs more than they do.
            for t in order:
                for slot, sequence, later in moving:
                    values[slot] = sequence[t + later]
                for call, places in calls:
                    call(*[values[place] for place in places])

        return run

    def gather(self, memory: Memory) -> None:
        """Nothing is apart that belongs together."""

    def release(self, memory: Memory) -> None:
        """Nothing is kept for the next pass."""

    def _call(
        self, instruction: Instruction, slots: dict[At, int], memory: Memory
    ) -> tuple[Callable[..., object], list[int]]:
        """An instruction as a function of the values in some slots."""
        if isinstance(instruction, Call):
            kernel = instruction.kernel
            places = [slots[at] for at in (*instruction.reads, *instruction.writes)]
            return kernel.eagerly if self._eager else kernel, places
        assert isinstance(instruction, Product)
        matrix: Tensor = memory[instruction.matrix.buffer]
        matrix = matrix.t() if instruction.transposed else matrix
        # Once for all steps: in float32 a product with a transposed matrix takes up to 1.4 times as long.
        matrix = by_columns(matrix) if matrix.dtype.itemsize == 2 else matrix.contiguous()
        adds = instruction.adds

        def multiply(left: Tensor, result: Tensor) -> None:
            if adds:
                result.addmm_(left, matrix)
            else:
                torch.mm(left, matrix, out=result)

        return multiply, [slots[instruction.left], slots[instruction.result]]


def by_columns(matrix: Tensor) -> Tensor:
    """The matrix with the numbers of each column side by side, as a layer's weight is multiplied.

    Where a processor has no instructions for half precision, torch multiplies row by row with any other matrix: by
    `timeit` of `torch.mm`, 32 × 256 by 256 × 1024 numbers of bfloat16 took 14.5 ms instead of 2.0 (one thread, AVX2).
    """
    return matrix.t().contiguous().t()


def interpret(instructions: Sequence[Instruction], values: dict[At, Tensor]) -> None:
    """Run instructions once, operation by operation, so that autograd sees each."""
    for instruction in instructions:
        if isinstance(instruction, Call):
            results = instruction.kernel.module.forward(*(values[at] for at in instruction.reads))
            values.update(zip(instruction.writes, results, strict=True))
        elif isinstance(instruction, Product):
            values[instruction.result] = values[instruction.left] @ values[instruction.matrix]
