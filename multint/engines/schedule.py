"""What is run of a step, as named buffers and a few kinds of instructions: to be printed, and executed.

A schedule has six sections. What is done *once* depends on nothing that a step changes, and the *prologue* computes
what the inputs of all steps give at once; these run by autograd. The *forward* section is one step, run for
t = 0 … T−1, and the *reverse* section is one step of the backward pass, run for t = T−1 … 0. An executor may run these
in blocks of some steps: the *entry* runs before each block forward, and the *exit* after each block backward.
Instructions name what they read and write, so an executor needs no other agreement with the planner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Buffer:
    """A value by name. Its shape is that of one step, or of one row of it where it has a row for each of the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    extent: Extent
    has_rows: bool

    def numel(self, rows: int) -> int:
        """The numbers of one step."""
        return math.prod(self.shape) * (rows if self.has_rows else 1)

    def sizes(self, rows: int, steps: int, block: int | None = None) -> tuple[int, ...]:
        """The shape of all its values; `block` is the most steps of a block, where these are not all."""
        shape, extent = (rows, *self.shape) if self.has_rows else self.shape, self.extent
        if extent is Extent.ONE or extent is Extent.NOW:
            return shape
        if extent is Extent.TURNS:
            return 2, *shape
        if extent is Extent.BLOCK:
            return steps if block is None else block, *shape
        return steps + (extent is Extent.STATES), *shape

    def allocate(self, shape: tuple[int, ...], zero: bool) -> Tensor:
        """Memory for its values in that shape."""
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=self.dtype, device=self.device)

    def place(self, step: int) -> int:
        """Where a step's value stands, where there are several."""
        return step % 2 if self.extent is Extent.TURNS else step

    def show(self, rows: int, steps: int) -> str:
        """Its shape over all steps, its dtype, and its size."""
        shape = self.sizes(rows, steps)
        size = math.prod(shape) * self.dtype.itemsize
        text = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
        return f"{shape} {str(self.dtype).removeprefix('torch.')}, {text}"


# The values of buffers by name. Names may be any text of the user's, so what an executor keeps beside them has another
# kind of key.
Memory = dict[Any, Tensor]


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


Instruction: TypeAlias = Product | Call | Contraction


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
            products, has several. A vector's may be in parts, such as by row, of which it is the sum.
        kept: the buffers that the forward pass makes and the backward pass reads.
    """

    buffers: dict[str, Buffer] = field(default_factory=dict)
    once: list[Call] = field(default_factory=list)
    prologue: list[Instruction] = field(default_factory=list)
    entry: list[Instruction] = field(default_factory=list)
    forward: list[Instruction] = field(default_factory=list)
    reverse: list[Instruction] = field(default_factory=list)
    exit: list[Instruction] = field(default_factory=list)
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
    def made(self) -> tuple[list[str], list[str]]:
        """The buffers that the forward pass fills, and those of the backward pass."""
        products = [instruction for instruction in self.exit if isinstance(instruction, Product)]
        forward, reverse = (
            [write.buffer for instruction in some for write in instruction.writes]
            for some in ([*self.entry, *self.forward], [*self.reverse, *products])
        )
        return list(dict.fromkeys(forward)), list(dict.fromkeys([*reverse, *self.cleared]))

    @cached_property
    def kept(self) -> list[str]:
        made = {write.buffer for instruction in [*self.entry, *self.forward] for write in instruction.writes}
        read = [at.buffer for instruction in [*self.reverse, *self.exit] for at in instruction.reads]
        return [name for name in dict.fromkeys(read) if name in made]

    @cached_property
    def summands(self) -> set[str]:
        """The buffers of all gradients."""
        return {name for names in self.gradients.values() for name in names}

    @cached_property
    def by_row(self) -> dict[str, str]:
        """The buffers of vectors' gradients that are there for each row, and whose they are."""
        pairs = {name: argument for argument, names in self.gradients.items() for name in names}
        return {n: a for n, a in pairs.items() if self.buffers[n].has_rows and not self.buffers[a].has_rows}

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

    def show(self, steps: int, rows: int) -> str:
        """The instructions, then the buffers that are there for all steps."""
        titles: dict[str, Sequence[Instruction]] = {
            "once a call": self.once,
            "once, for all steps": self.prologue,
            "for many steps at once": self.entry,
            "each step t": self.forward,
            "each step t backward": self.reverse,
            "for many steps at once, backward": self.exit,
        }
        sections = {title: [i.show(self.buffers) for i in instructions] for title, instructions in titles.items()}
        sections["once, after the last"] = [f"d_{argument} = Σ {name}" for name, argument in self.by_row.items()]
        long = [b for b in self.buffers.values() if b.extent in (Extent.EACH, Extent.STATES)]
        sections["buffers with a value for each step"] = [f"{b.name:<12} {b.show(rows, steps)}" for b in long]
        lines = []
        for title, content in sections.items():
            if content:
                lines += [f"{title}:", *(f"  {line}" for line in content)]
        if self.reverse:
            lines.append("+d is added to; rows(d) is summed for each row of the batch apart")
        return "\n".join(lines)
