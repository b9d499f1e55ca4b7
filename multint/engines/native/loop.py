"""Running a section of a schedule by native code: all steps of a loop, for any T and B, in one call.

Each section becomes one C++ function: its products and pieces for one step, within the loop over the steps. Rows do not
see each other, so each thread takes some rows through all steps, and waits for none. Where a matrix does not fit the
cache of one core, the threads share its columns instead and wait for each other at every product.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multint.engines.failures import RefusedError
from multint.engines.native import loops, machine
from multint.engines.schedule import At, Buffer, Call, Extent, Instruction, Memory, Product, Schedule

# The bytes of a product's matrix from which threads share its columns: what a core's cache holds. Two threads with
# AVX-512 took 15 % longer by columns at 1 MiB, and 4 % less at 4 MiB.
_BY_COLUMNS = 2**21

# What is kept of one pass for the next one: its memory under this key, of at most so many bytes. What is larger takes
# long enough to fill that new pages cost little beside it.
_PIECE = object()
_MOST_RELEASED = 2**23

# Numbers of one row's intermediate values, which lie on a thread's stack.
_MOST_SCRATCH = 2**15

_ALIGNED = 64  # bytes: a line of a cache

# The bytes that a block of steps leaves for the products after it, which are to be in a core's cache still: most have
# 1 to 2 MiB. But with fewer rows than these a product is slow, since it reads its matrix for too few.
_CACHED = 2**20
_LEAST_ROWS = 512


class _Layout(NamedTuple):
    """What `allocate` gives for a number of steps, rows and threads."""

    key: tuple[int, int, int]
    apart: list[tuple[Buffer, tuple[int, ...], bool]]  # with their shapes, and whether they are 0
    together: list[tuple[str, tuple[int, ...]]]
    sizes: list[int]  # of the latter, and what each leaves up to a line of the cache


# The numbers of native.h's `Slot`: a value's address, the distances in bytes between steps, rows and parts, whether
# steps take turns, and how many steps later it is.
_OF_A_SLOT = 6


class Loop:
    """The forward or the reverse section of a schedule as native code, which is there after `build`.

    Attributes:
        own: the buffers of which each thread sums up its own part: (threads, 2, ...), what is to be added to the total,
            0 after the last step, and the total.

    Raises: RefusedError for what has no native code here.
    """

    def __init__(self, schedule: Schedule, reverse: bool) -> None:
        section = schedule.reverse if reverse else schedule.forward
        self._buffers = buffers = schedule.buffers
        self._slots = list(dict.fromkeys(at for i in section for at in (*i.reads, *i.writes)))
        self._products = [i for i in section if isinstance(i, Product)]
        self._sides = [_sides(product, buffers) for product in self._products]
        self._dtype = _number_type(section, buffers)
        adds = {write.buffer for i in section for write, adding in i.writes.items() if adding}
        self.own = frozenset(name for name in adds if name in schedule.by_row or not buffers[name].has_rows)
        self._text = self._source(section)
        self._released: list[Tensor] = []
        self._layout: _Layout | None = None
        self._places = [self._place(at) for at in self._slots]
        self._of_blocks = [i for i, at in enumerate(self._slots) if buffers[at.buffer].extent is Extent.BLOCK]
        self._bytes_of_a_row = sum(self._places[i][2] for i in self._of_blocks)

    def build(self) -> None:
        """Compile and load it.

        Raises: RefusedError where that cannot be done.
        """
        library = machine.library(self._text, self._dtype)
        self._run, self._pack = library.run, library.pack
        self._panel = int(library.panel_columns())

    def _source(self, section: Sequence[Instruction]) -> str:
        """The C++ of the section."""
        functions: dict[str, str] = {}
        lines = []
        for instruction in section:
            if isinstance(instruction, Call):
                text, scratch = instruction.kernel.cpp()
                if scratch > _MOST_SCRATCH:
                    raise RefusedError(f"a row's intermediate values are {scratch} numbers")
                name = functions.setdefault(text, f"piece{len(functions)}")
                arguments = ", ".join(self._at(at, "row") for at in (*instruction.reads, *instruction.writes))
                lines.append(f"for (int64_t row = part.first; row < part.last; ++row) {name}({arguments});")
            elif isinstance(instruction, Product):
                matrix, adds = self._products.index(instruction), "true" if instruction.adds else "false"
                inner, columns = self._sides[matrix]
                left, result = (self._at(at, "0") for at in (instruction.left, instruction.result))
                lines.append(f"product(part, {left}, packed[{matrix}], {result}, {inner}, {columns}, {adds});")
        for name in sorted(self.own):
            at = next(at for at in self._slots if at.buffer == name)
            lines.append(f"if (total) add_to_total({self._at(at, '0')}, {self._buffers[name].numel(1)});")
        body = "\n".join(f"      {line}" for line in lines)
        pieces = "\n\n".join(text.replace(loops.NAME, name) for text, name in functions.items())
        return f"{pieces}\n{_RUN.replace('BODY', body)}"

    def _at(self, at: At, row: str) -> str:
        kind = "bool" if self._buffers[at.buffer].dtype == torch.bool else "real"
        return f"at<{kind}>(slots[{self._slots.index(at)}], part, t, {row})"

    def _place(self, at: At) -> tuple[str, int, int, int, bool, int]:
        """A value's buffer, and in bytes the row of a step, of a batch and of a part; whether steps take turns, and how
        many steps later it is.
        """
        buffer = self._buffers[at.buffer]
        row = buffer.numel(1) * buffer.dtype.itemsize
        if at.buffer in self.own:
            return at.buffer, 0, 0, 2 * row, False, 0
        by_row = row if buffer.has_rows else 0
        by_step = 0 if buffer.extent in (Extent.ONE, Extent.NOW) else by_row
        return at.buffer, by_step, by_row, 0, buffer.extent is Extent.TURNS, at.later or 0

    def blocks(self, steps: int, rows: int) -> list[range]:
        """The steps in blocks, which differ by one step at most."""
        most = max(_LEAST_ROWS, _CACHED // max(1, self._bytes_of_a_row))
        count = max(1, min(steps, steps * rows // most))
        return [range(steps * i // count, steps * (i + 1) // count) for i in range(count)]

    def over(self, memory: Memory, rows: int) -> Callable[[range], None]:
        """A function that runs the section for some steps, in the order given, on what the memory holds."""
        threads = max(1, min(torch.get_num_threads(), rows))
        by_columns = any(self._dtype.itemsize * inner * columns >= _BY_COLUMNS for inner, columns in self._sides)
        if by_columns:
            threads = torch.get_num_threads()
        packed = []
        for product, (inner, columns) in zip(self._products, self._sides, strict=True):
            matrix: Tensor = memory[product.matrix.buffer]
            matrix = matrix.t() if product.transposed else matrix
            size = inner * -(-columns // self._panel) * self._panel
            place = torch.empty(size, dtype=self._dtype, device="cpu")  # whatever the defaults are
            numbers = (*matrix.stride(), inner, columns, place.data_ptr(), threads)
            self._pack(*map(ctypes.c_int64, (matrix.data_ptr(), *numbers)))
            packed.append(place)
        some: list[int] = []
        for name, by_step, by_row, part, turns, later in self._places:
            some += (memory[name].data_ptr(), rows * by_step, by_row, part, turns, later)
        slots = (ctypes.c_int64 * len(some))(*some)

        def run(order: range) -> None:
            for i in self._of_blocks:  # whose first value is that of the block's first step
                slots[_OF_A_SLOT * i + 5] = -min(order)
            matrices = (ctypes.c_int64 * max(1, len(packed)))(*(place.data_ptr() for place in packed))
            numbers = (order.start, len(order), order.step, rows, threads, by_columns)
            self._run(slots, matrices, *map(ctypes.c_int64, numbers))

        return run

    def allocate(
        self,
        names: Iterable[str],
        results: Collection[str],
        cleared: Collection[str],
        steps: int,
        rows: int,
    ) -> Memory:
        """Memory for what is made of some buffers, which is 0 where it is `cleared`.

        It is one piece but for the results, which outlive the pass: new pages of the system's cost more than what
        is written to them, and of one piece the allocator gives fewer back than of many. A piece that was released is
        taken again.
        """
        key = steps, rows, torch.get_num_threads()
        layout = self._layout  # another thread may put another one in its place
        if layout is None or layout.key != key:
            layout = self._layout = self._laid_out(names, results, cleared, key)
        found: Memory = {buffer.name: buffer.allocate(shape, zero) for buffer, shape, zero in layout.apart}
        size = sum(layout.sizes)
        piece = self._piece(size)
        for (name, shape), part in zip(layout.together, piece[:size].split(layout.sizes)[::2], strict=True):
            found[name] = part.view(shape)
        found[_PIECE] = piece
        return found

    def _laid_out(
        self, names: Iterable[str], results: Collection[str], cleared: Collection[str], key: tuple[int, int, int]
    ) -> _Layout:
        """Which buffers have memory of their own, and which share one piece; kept, since most calls are of one size."""
        steps, rows, threads = key
        block = max(map(len, self.blocks(steps, rows)))
        layout = _Layout(key, [], [], [])
        for name in names:
            buffer = self._buffers[name]
            shape = buffer.sizes(rows, steps, block)
            if name in self.own:
                layout.apart.append((buffer, (threads, 2, *buffer.shape), True))
            elif name in cleared or name in results or buffer.dtype != self._dtype:
                layout.apart.append((buffer, shape, name in cleared))
            else:
                size = math.prod(shape)
                layout.together.append((name, shape))
                layout.sizes.extend((size, -size % (_ALIGNED // self._dtype.itemsize)))
        return layout

    def _piece(self, size: int) -> Tensor:
        """Memory for that many numbers, which no one else uses."""
        try:
            piece = self._released.pop()  # at once: another thread may look for it
        except IndexError:
            piece = None
        if piece is None or not size <= len(piece) <= 2 * size:
            with torch.inference_mode(False):  # the next pass may be one with gradients
                piece = torch.empty(size, dtype=self._dtype, device="cpu")
        return piece

    def release(self, memory: Memory) -> None:
        """Let the next pass take what `allocate` gave. Only the results may be read from here on."""
        piece = memory[_PIECE]
        if piece.nbytes <= _MOST_RELEASED and not self._released:
            self._released.append(piece)


def _number_type(section: Sequence[Instruction], buffers: dict[str, Buffer]) -> torch.dtype:
    """The one dtype that a section computes in, beside bool.

    Raises: RefusedError where it is none that native code has, or where there are several.
    """
    some = [buffers[at.buffer] for i in section for at in (*i.reads, *i.writes)]
    for buffer in some:
        if buffer.device.type != "cpu":
            raise RefusedError(f"its tensors are on {buffer.device}")
    found = {buffer.dtype for buffer in some}.union(*(i.kernel.dtypes() for i in section if isinstance(i, Call)))
    found -= {torch.bool}
    if len(found) > 1 or not found <= {torch.float32, torch.float64}:
        raise RefusedError(f"it computes in {' and '.join(sorted(str(d).removeprefix('torch.') for d in found))}")
    return next(iter(found), torch.float32)


def _sides(product: Product, buffers: dict[str, Buffer]) -> tuple[int, int]:
    """The shape of a product's matrix, as it is multiplied."""
    left, matrix = buffers[product.left.buffer], buffers[product.matrix.buffer]
    if len(left.shape) != 1 or len(matrix.shape) != 2:
        raise RefusedError("it has a product of values that are no rows")
    rows, columns = matrix.shape
    return (columns, rows) if product.transposed else (rows, columns)


_RUN = """
extern "C" void run(const Slot *slots, const real *const *packed, int64_t start, int64_t steps, int64_t by,
                    int64_t rows, int64_t threads, int64_t by_columns) {
  in_parts(threads, rows, by_columns, [&](const Part &part) {
    const int64_t often = 1 + SUMMED_AT_ONCE / (part.last - part.first + 1);
    for (int64_t i = 0, t = start; i < steps; ++i, t += by) {
      [[maybe_unused]] const bool total = i % often == 0 || i + 1 == steps;
BODY
    }
  });
}
"""
