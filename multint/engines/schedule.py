"""What is run of a step, as named buffers and a few kinds of instructions: to be printed, checked, and executed.

A schedule has eight sections. The *prelude* computes what depends on the parameters alone, *beside* it what depends on
the fields of the state that no step changes, and the *prologue* what the inputs of all steps give at once; these run by
autograd. The *forward* section is one step, run for t = 0 … T−1, and the
*reverse* section is one step of the backward pass, run for t = T−1 … 0. An executor may run these in blocks of
some steps: the *entry* runs before each block forward, and the *exit* after each block backward. The *epilogue* runs
once after that.
Instructions name what they read and write, so an executor needs no other agreement with the planner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from multint.engines.kernel import Kernel


class Extent(Enum):
    """How many values a buffer holds, over the steps."""

    ONE = "one for all steps"
    EACH = "one for each step"
    BLOCK = "one for each step of a block"
    STATES = "one before each step, and one after the last"
    TURNS = "two, this step's and the next one's, in turn"
    NOW = "one, of the present step"


class Rows(Enum):
    """Whether a buffer's value has a row for each of the batch."""

    YES = "(B, ...)"
    NO = "(...)"


@dataclass(frozen=True)
class Buffer:
    """A value by name. Its shape is that of one step; where `rows` is YES, without the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    extent: Extent
    rows: Rows = Rows.YES
    given: bool = False  # before the section that first reads it; else an instruction of the schedule makes it

    def numel(self, batch_size: int) -> int:
        """The numbers of one step."""
        return math.prod(self.shape) * (batch_size if self.rows is Rows.YES else 1)

    def empty(self, batch_size: int, steps: int | None = None) -> Tensor:
        """Memory for one step, or for that many."""
        shape = (batch_size, *self.shape) if self.rows is Rows.YES else self.shape
        return torch.empty(shape if steps is None else (steps, *shape), dtype=self.dtype, device=self.device)

    def show(self, steps: int, batch_size: int) -> str:
        """Its shape over all steps, its dtype, and its size."""
        times = {Extent.EACH: [steps], Extent.BLOCK: [steps], Extent.STATES: [steps + 1], Extent.TURNS: [2]}.get(
            self.extent, []
        )
        shape = (*times, *([batch_size] if self.rows is Rows.YES else []), *self.shape)
        size = math.prod(shape) * self.dtype.itemsize
        told = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
        return f"{shape} {str(self.dtype).removeprefix('torch.')}, {told}"


class Turns:
    """A value for each step of which two are there, this step's and the next one's, in memory that stays in place."""

    def __init__(self, both: Tensor) -> None:
        self.both = both  # (2, ...): of the even steps and of the odd ones

    def __getitem__(self, t: int) -> Tensor:
        return self.both[t % 2]

    def __setitem__(self, t: int, value: Any) -> None:
        self.both[t % 2] = value


# What a buffer's name stands for in a run: a tensor or, where there is one for each step, a tensor or `Turns` of them.
# Names may be any text of the user's, so what an executor keeps beside them has another kind of key.
Memory = dict[Any, Any]


class At(NamedTuple):
    """A buffer's value at a step: this one's, or that many steps later; all of them, or of a block, for None."""

    buffer: str
    later: int | None = 0

    def show(self, buffers: dict[str, Buffer]) -> str:
        """As it is written: h[t+1], W."""
        if buffers[self.buffer].extent is Extent.ONE:
            return self.buffer
        return f"{self.buffer}[{':' if self.later is None else f't+{self.later}' if self.later else 't'}]"


@dataclass(frozen=True)
class Product:
    """result = left @ matrix, or left @ matrixᵀ, for all rows; or added to what the result's buffer holds."""

    result: At
    left: At
    matrix: At
    transposed: bool = False
    adds: bool = False

    @property
    def reads(self) -> tuple[At, ...]:
        return self.left, self.matrix

    @property
    def writes(self) -> dict[At, bool]:
        return {self.result: self.adds}

    def show(self, buffers: dict[str, Buffer]) -> str:
        left, matrix = buffers[self.left.buffer], buffers[self.matrix.buffer]
        shape = matrix.shape[::-1] if self.transposed else matrix.shape
        sign, suffix = "+=" if self.adds else "=", "ᵀ" if self.transposed else ""
        line = f"{self.result.show(buffers)} {sign} {self.left.show(buffers)} @ {matrix.name}{suffix}"
        rows = "T·B" if self.left.later is None else "B"
        return f"{line:<44}  ({rows} × {left.shape[-1]}) @ ({shape[0]} × {shape[1]})"


@dataclass(frozen=True)
class Call:
    """results = kernel(arguments): one piece of the step, row-wise code; or its vector-Jacobian product."""

    kernel: Kernel
    reads: tuple[At, ...]
    writes: dict[At, bool]  # and whether it adds to what is there

    def show(self, buffers: dict[str, Buffer]) -> str:
        names = ", ".join(read.show(buffers) for read in self.reads)
        added = [write.show(buffers) for write, adds in self.writes.items() if adds]
        written = ", ".join(write.show(buffers) for write, adds in self.writes.items() if not adds)
        given = ", ".join([written] * bool(written) + [f"+{name}" for name in added])
        count = self.kernel.operations()
        line = f"{given} = kernel({names})  {count} operation{'s' if count > 1 else ''}"
        return line if len(line) < 110 else line.replace(" = kernel(", "\n      = kernel(")


@dataclass(frozen=True)
class Contraction:
    """result = Σ over all steps and rows of leftᵀ right: the gradient of a matrix. Each block adds its own."""

    result: At
    left: At
    right: At

    @property
    def reads(self) -> tuple[At, ...]:
        return self.left, self.right

    @property
    def writes(self) -> dict[At, bool]:
        return {self.result: False}

    def show(self, buffers: dict[str, Buffer]) -> str:
        left, right = buffers[self.left.buffer], buffers[self.right.buffer]
        line = f"{self.result.show(buffers)} = {self.left.show(buffers)}ᵀ @ {self.right.show(buffers)}"
        return f"{line:<44}  ({left.shape[-1]} × T·B) @ (T·B × {right.shape[-1]})"


@dataclass(frozen=True)
class RowSum:
    """result = the sum of a buffer's rows."""

    result: At
    source: At

    @property
    def reads(self) -> tuple[At, ...]:
        return (self.source,)

    @property
    def writes(self) -> dict[At, bool]:
        return {self.result: False}

    def show(self, buffers: dict[str, Buffer]) -> str:
        return f"{self.result.show(buffers)} = Σ {self.source.show(buffers)}"


Instruction: TypeAlias = Product | Call | Contraction | RowSum


@dataclass
class Schedule:
    """A step's instructions and their buffers.

    Attributes:
        inputs: the buffers of the streams that the caller gives, by the streams' names.
        invariants: the buffers of the cell's tensors, in the order of the plan.
        literals: what the step makes of numbers in its code.
        arguments: what autograd differentiates the loop by: streams, what the hoisted products multiply, matrices,
            vectors and the first state.
        may_learn: those that may have a gradient, but for the state.
        fields: the buffers of the state's fields: `states`, and those that no step changes, which have one value.
        states: the buffers of the fields that a step changes, the output's first.
        output_gradient: the buffer that the output's gradient is given in.
        cleared: the gradients that are 0 before the reverse section adds to them, or that nothing writes.
        gradients: the buffers whose sum is an argument's gradient. What is several of these, or the matrix of two
            products, has several.
        kept: the buffers that the forward pass makes and the backward pass reads.
    """

    buffers: dict[str, Buffer] = field(default_factory=dict)
    prelude: list[Instruction] = field(default_factory=list)
    beside: list[Instruction] = field(default_factory=list)
    prologue: list[Instruction] = field(default_factory=list)
    entry: list[Instruction] = field(default_factory=list)
    forward: list[Instruction] = field(default_factory=list)
    reverse: list[Instruction] = field(default_factory=list)
    exit: list[Instruction] = field(default_factory=list)
    epilogue: list[Instruction] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    invariants: list[str] = field(default_factory=list)
    literals: dict[str, Tensor] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    may_learn: frozenset[str] = frozenset()
    fields: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    output_gradient: str = ""
    cleared: list[str] = field(default_factory=list)
    gradients: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def kept(self) -> list[str]:
        made = {write.buffer for instruction in [*self.entry, *self.forward] for write in instruction.writes}
        read = [at.buffer for instruction in [*self.reverse, *self.exit, *self.epilogue] for at in instruction.reads]
        return [name for name in dict.fromkeys(read) if name in made]

    @cached_property
    def summands(self) -> set[str]:
        """The buffers of all gradients."""
        return {name for names in self.gradients.values() for name in names}

    @cached_property
    def matrices(self) -> set[str]:
        """The arguments that only products read, each in the order that it wants: the numbers may lie in any."""
        some = [*self.entry, *self.forward, *self.reverse]
        matrices = {i.matrix.buffer for i in some if isinstance(i, Product)}
        return matrices - {at.buffer for i in some for at in i.reads if not (isinstance(i, Product) and at == i.matrix)}

    @cached_property
    def bytes_per_row(self) -> int:
        """What one row of one step takes in memory until the backward pass, the caller's inputs aside."""
        held = {*self.kept, *self.states[:1], *(write.buffer for i in self.prologue for write in i.writes)}
        buffers = [self.buffers[name] for name in held]
        return sum(b.numel(1) * b.dtype.itemsize for b in buffers if b.extent is not Extent.ONE)

    def show(self, steps: int, batch_size: int) -> str:
        """The instructions, then the buffers that are there for all steps."""
        lines = []
        titles = {
            "once, of the parameters": self.prelude,
            "once, of what no step changes": self.beside,
            "once, for all steps": self.prologue,
            "for many steps at once": self.entry,
            "each step t": self.forward,
            "each step t backward": self.reverse,
            "for many steps at once, backward": self.exit,
            "once, after the last": self.epilogue,
        }
        for title, instructions in titles.items():
            if instructions:
                lines += [f"{title}:", *(f"  {instruction.show(self.buffers)}" for instruction in instructions)]
        long = [b for b in self.buffers.values() if b.extent in (Extent.EACH, Extent.STATES)]
        lines += ["buffers with a value for each step:", *(f"  {b.name:<12} {b.show(steps, batch_size)}" for b in long)]
        if self.reverse:
            lines.append("+d is added to; rows(d) is summed for each row of the batch apart")
        return "\n".join(lines)


def check(schedule: Schedule) -> None:
    """Assert what executors rely on.

    Everything is written before it is read. No instruction reads what it writes over, and no value has two writers,
    except that gradients are added to: the first writer of each, or its clearing, does not add.
    """
    buffers = schedule.buffers
    assert all(name == buffer.name for name, buffer in buffers.items())
    once = {At(name, None) for name, b in buffers.items() if b.given} | {
        At(name, 0) for name, b in buffers.items() if b.given and b.extent is Extent.ONE
    }
    before = [*schedule.prelude, *schedule.beside, *schedule.prologue]
    _check_section(before, once, set())
    made = {write.buffer for instruction in before for write in instruction.writes}
    made |= {name for name, b in buffers.items() if b.given}
    entered = _check_section(schedule.entry, {At(n, None) for n in made} | {At(n) for n in made}, set())
    made |= {at.buffer for at in entered}
    fixed = {At(name) for name in made if buffers[name].extent in (Extent.ONE, Extent.EACH, Extent.BLOCK)}
    first = {At(name) for name in schedule.states}
    after = _check_section(schedule.forward, fixed | first, set())
    assert {At(name, 1) for name in schedule.states} <= after, "a state is not written"
    if not schedule.reverse:
        return
    there = fixed | first | {at for at in after if at.buffer in schedule.kept}
    carried = {name for name in schedule.summands if buffers[name].extent is Extent.TURNS}
    cleared = {At(name) for name in schedule.cleared}
    after = _check_section(schedule.reverse, there | {At(name, 1) for name in carried} | cleared, cleared)
    assert {At(name) for name in carried} <= after, "a state's gradient is not written"
    over_all = {At(at.buffer, None) for at in after if buffers[at.buffer].extent is not Extent.NOW} | after
    after = _check_section(schedule.exit, over_all, set())
    after = _check_section(schedule.epilogue, after, set())
    assert schedule.summands <= {at.buffer for at in after}, "a gradient is not written"


def _check_section(instructions: list[Instruction], there: set[At], cleared: set[At]) -> set[At]:
    """What is there after the instructions, given what is there before them and what may be added to."""
    there, written = set(there), set(cleared)
    for instruction in instructions:
        for read in instruction.reads:
            assert read in there, f"{read} is read before it is written"
        for write, adds in instruction.writes.items():
            assert write not in instruction.reads, f"{write} is read and written by one instruction"
            assert adds == (write in written), f"{write} has two first writers, or none"
            assert adds or write not in there, f"{write} is written over"
        written.update(instruction.writes)
        there.update(instruction.writes)
    return there
