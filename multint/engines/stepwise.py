"""Running a section of a schedule step by step in Python: any instruction, by any library, on any device.

The reference for native loops, which take the place of `execute` and `allocate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from multint.engines.onednn import prepared_product
from multint.engines.schedule import At, Buffer, Call, Extent, Instruction, Product

_BY_STEP = (Extent.EACH, Extent.BLOCK, Extent.STATES, Extent.TURNS)

# What a buffer's name stands for in a run: a value or, where there is one for each step, a sequence of them. Names may
# be any text of the user's, so what an executor keeps beside them has another kind of key.
Memory = dict[Any, Any]


def execute(
    instructions: Sequence[Instruction],
    buffers: dict[str, Buffer],
    memory: Memory,
    order: range,
    rows: int,
    eager: bool = False,
) -> None:
    """Run a section of a schedule for each step, in the order given. What products return is put into the memory.

    Args:
        eager: the pieces run op by op.
    """
    slots = {at: slot for slot, at in enumerate(dict.fromkeys(a for i in instructions for a in (*i.reads, *i.writes)))}
    by_step = [at for at in slots if buffers[at.buffer].extent in _BY_STEP]
    returned = {i.result for i in instructions if isinstance(i, Product) and not i.adds}
    values = [memory.get(at.buffer) for at in slots]
    moving = [(slots[at], memory[at.buffer], at.later or 0) for at in by_step if at not in returned]
    calls = [_ready(i, slots, buffers, memory, len(order), rows, eager) for i in instructions]
    # The views are made as they are needed: thousands of them alive at once set off Python's garbage collector, which
    # costs more than they do.
    for t in order:
        for slot, sequence, later in moving:
            values[slot] = sequence[t + later]
        for call in calls:
            call(values, t)


def interpret(instructions: Sequence[Instruction], values: dict[At, Tensor]) -> None:
    """Run instructions once, operation by operation, so that autograd sees each."""
    for instruction in instructions:
        if isinstance(instruction, Call):
            results = instruction.kernel.module.forward(*(values[at] for at in instruction.reads))
            values.update(zip(instruction.writes, results, strict=True))
        elif isinstance(instruction, Product):
            values[instruction.result] = values[instruction.left] @ values[instruction.matrix]


def _ready(
    instruction: Instruction,
    slots: dict[At, int],
    buffers: dict[str, Buffer],
    memory: Memory,
    steps: int,
    rows: int,
    eager: bool,
) -> Callable[[list[Any], int], None]:
    """An instruction as a function of the values of one step."""
    if isinstance(instruction, Call):
        kernel: Callable[[list[Tensor]], None] = instruction.kernel.eagerly if eager else instruction.kernel
        places = [slots[at] for at in (*instruction.reads, *instruction.writes)]

        def call(values: list[Any], t: int) -> None:
            kernel([values[place] for place in places])

        return call
    assert isinstance(instruction, Product)
    result, left, adds = slots[instruction.result], slots[instruction.left], instruction.adds
    matrix: Tensor = memory[instruction.matrix.buffer]
    times = prepared_product(matrix.t() if instruction.transposed else matrix, rows, steps)
    name = instruction.result.buffer
    store = memory[name] if buffers[name].extent in _BY_STEP and not adds else None

    def multiply(values: list[Any], t: int) -> None:
        made = times(values[left])
        if adds:
            values[result].add_(made)
            return
        values[result] = made
        if store is not None:
            store[t] = made

    return multiply


class Turns:
    """A value for each step of which two are there: this step's and the next one's."""

    def __init__(self, pair: list[Tensor]) -> None:
        self.pair = pair

    def __getitem__(self, t: int) -> Tensor:
        return self.pair[t % 2]

    def __setitem__(self, t: int, value: Tensor) -> None:
        self.pair[t % 2] = value


def allocate(
    buffers: dict[str, Buffer],
    names: Iterable[str],
    apart: Collection[str | None],
    cleared: Collection[str],
    steps: int,
    rows: int,
) -> Memory:
    """Memory for what is made of some buffers, which is 0 where it is `cleared`. All of it is `apart` here."""
    return {name: _memory_of(buffers[name], steps, rows, name in cleared) for name in names}


def _memory_of(buffer: Buffer, steps: int, rows: int, zeros: bool) -> Any:
    """Nothing yet where a product returns it."""
    if buffer.by_product and not zeros:
        return [None] * steps
    if buffer.extent is Extent.TURNS:
        return [buffer.empty(rows).zero_()] * (steps + 1) if zeros else Turns([buffer.empty(rows) for _ in range(2)])
    count = {Extent.EACH: steps, Extent.BLOCK: steps, Extent.STATES: steps + 1}.get(buffer.extent)
    made = buffer.empty(rows, count)
    return made.zero_() if zeros else made
