"""Running a section of a schedule by native code: all steps of a loop, for any T and B, in one call.

Each section becomes one C++ function: its products and pieces for one step, within the loop over the steps. Rows do not
see each other, so each thread takes some rows through all steps, and waits for none. Where a matrix does not fit the
cache of one core, the threads share its columns instead and wait for each other at every product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multint.engines import cpp, machine
from multint.engines.capture import TRACING
from multint.engines.failures import RefusedError, report
from multint.engines.kernel import compiles
from multint.engines.schedule import At, Buffer, Call, Extent, Instruction, Product, Rows, Schedule, Sum
from multint.engines.stepwise import Memory, Turns, execute
from multint.errors import in_a_line

if TYPE_CHECKING:
    from multint.engines.program import Program

# The bytes of a product's matrix from which threads share its columns: about what one core's cache holds. Not tuned.
_BY_COLUMNS = 2**20


def loop_of(program: Program, schedule: Schedule, reverse: bool) -> Loop | None:
    """The native loop of a program's schedule, forward or reverse; None where there is none, which the program tells.

    It is proved at its first use: it gives what the pieces and products give one by one, on random numbers.
    """
    if not compiles():
        return None
    key = id(schedule), reverse
    if key not in program.loops:
        with TRACING:
            if key not in program.loops:
                program.loops[key] = _made(schedule, reverse)
    made = program.loops[key]
    return None if isinstance(made, str) else made


def _made(schedule: Schedule, reverse: bool) -> Loop | str:
    try:
        loop = Loop(schedule, reverse)
        loop.build()
        loop.prove()
    except RefusedError as error:
        return str(error)
    except Exception as error:
        report(f"its native loop failed by {in_a_line(error)}", "its steps are run from Python")
        return f"it failed by {in_a_line(error)}"
    return loop


def why_not(program: Program, schedule: Schedule, reverse: bool) -> str:
    """Why a schedule's loop is run step by step from Python; empty where it is native. Nothing is compiled for that."""
    if not compiles():
        return "nothing is to be compiled"
    made = program.loops.get((id(schedule), reverse))
    if made is not None:
        return made if isinstance(made, str) else ""
    try:
        Loop(schedule, reverse)
        machine.compiler()
    except RefusedError as error:
        return str(error)
    return ""


class _Turns:
    """A value for each step of which two are there, in memory that stays in its place."""

    def __init__(self, both: Tensor) -> None:
        self.both = both  # (2, ...): of the even steps and of the odd ones

    def __getitem__(self, t: int) -> Tensor:
        return self.both[t % 2]

    def __setitem__(self, t: int, value: Tensor) -> None:
        self.both[t % 2] = value


class Loop:
    """The forward or the reverse section of a schedule as native code, which is there after `build`.

    Attributes:
        own: the buffers of which each thread sums up its own part: (threads, 2, ...), what is added up and the total.

    Raises: RefusedError for what has no native code here.
    """

    def __init__(self, schedule: Schedule, reverse: bool) -> None:
        self._section = section = schedule.reverse if reverse else schedule.forward
        self._buffers = buffers = schedule.buffers
        # Of whose rows the epilogue takes the sum.
        self._summed = frozenset(i.source.buffer for i in schedule.epilogue if isinstance(i, Sum))
        self._slots = list(dict.fromkeys(at for i in section for at in (*i.reads, *i.writes)))
        self._products = [i for i in section if isinstance(i, Product)]
        for name in {at.buffer for at in self._slots}:
            if buffers[name].device.type != "cpu":
                raise RefusedError(f"its tensors are on {buffers[name].device}")
        adds = {write.buffer for i in section for write, adding in i.writes.items() if adding}
        self.own = frozenset(name for name in adds if name in self._summed or buffers[name].rows is Rows.NO)
        self._text = self._source(section)

    def build(self) -> None:
        """Compile and load it.

        Raises: RefusedError where that cannot be done.
        """
        library = machine.library(self._text)
        self._run, self._pack = library.run, library.pack
        self._panel = int(library.panel_columns())

    def _source(self, section: Sequence[Instruction]) -> str:
        """The C++ of the section."""
        functions: dict[str, str] = {}
        lines = []
        for instruction in section:
            if isinstance(instruction, Call):
                text = instruction.kernel.cpp()
                name = functions.setdefault(text, f"piece{len(functions)}")
                arguments = ", ".join(self._at(at, "row") for at in (*instruction.reads, *instruction.writes))
                lines.append(f"for (int64_t row = part.first; row < part.last; ++row) {name}({arguments});")
            elif isinstance(instruction, Product):
                inner, columns = self._sides(instruction)
                matrix, adds = self._products.index(instruction), "true" if instruction.adds else "false"
                left, result = (self._at(at, "0") for at in (instruction.left, instruction.result))
                lines.append(f"product(part, {left}, packed[{matrix}], {result}, {inner}, {columns}, {adds});")
        for name in sorted(self.own):
            at = next(at for at in self._slots if at.buffer == name)
            lines.append(f"if (total) add_to_total({self._at(at, '0')}, {self._buffers[name].numel(1)});")
        body = "\n".join(f"      {line}" for line in lines)
        pieces = "\n\n".join(text.replace(cpp.NAME, name) for text, name in functions.items())
        return f"{pieces}\n{_RUN.replace('BODY', body)}"

    def _at(self, at: At, row: str) -> str:
        kind = {torch.float32: "float", torch.bool: "bool"}.get(self._buffers[at.buffer].dtype)
        if kind is None:
            raise RefusedError(f"it computes in {str(self._buffers[at.buffer].dtype).removeprefix('torch.')}")
        return f"at<{kind}>(slots[{self._slots.index(at)}], part, t, {row})"

    def _sides(self, product: Product) -> tuple[int, int]:
        left, matrix = self._buffers[product.left.buffer], self._buffers[product.matrix.buffer]
        if len(left.shape) != 1 or len(matrix.shape) != 2:
            raise RefusedError("it has a product of values that are no rows")
        return matrix.shape[::-1] if product.transposed else matrix.shape

    def __call__(self, memory: Memory, order: range, rows: int) -> None:
        """Run the section for each step, in the order given, on what the memory holds."""
        threads = max(1, min(torch.get_num_threads(), rows))
        sizes = [self._sides(product) for product in self._products]
        by_columns = any(4 * inner * columns >= _BY_COLUMNS for inner, columns in sizes)
        if by_columns:
            threads = torch.get_num_threads()
        packed = []
        for product, (inner, columns) in zip(self._products, sizes, strict=True):
            matrix: Tensor = memory[product.matrix.buffer]
            matrix = matrix.t() if product.transposed else matrix
            size = inner * -(-columns // self._panel) * self._panel
            place = torch.empty(size, dtype=torch.float32, device="cpu")  # whatever the defaults are
            numbers = (*matrix.stride(), inner, columns, place.data_ptr(), threads)
            self._pack(*map(ctypes.c_int64, (matrix.data_ptr(), *numbers)))
            packed.append(place)
        slots = [number for at in self._slots for number in self._slot(at, memory[at.buffer], rows)]
        matrices = [place.data_ptr() for place in packed]
        self._run(
            (ctypes.c_int64 * len(slots))(*slots),
            (ctypes.c_int64 * max(1, len(matrices)))(*matrices),
            *map(ctypes.c_int64, (order.start, len(order), order.step, rows, threads, by_columns)),
        )

        for name in self.own:
            totals = memory[name][:, 1]
            memory[name] = totals if name in self._summed else totals.sum(0)

    def memory_of(self, buffer: Buffer, steps: int, rows: int, zeros: bool = False) -> Any:
        """Memory for what is made of a buffer."""
        if buffer.name in self.own:
            return torch.zeros(torch.get_num_threads(), 2, *buffer.shape, dtype=buffer.dtype, device=buffer.device)
        states = buffer.extent is Extent.STATES or (zeros and buffer.extent is Extent.TURNS)
        count = {Extent.EACH: steps, Extent.TURNS: 2}.get(buffer.extent)
        made = buffer.empty(rows, steps + 1 if states else count)
        if zeros:
            made.zero_()
        return _Turns(made) if buffer.extent is Extent.TURNS and not zeros else made

    def prove(self) -> None:
        """Raise unless it gives what the instructions give one by one, on random numbers."""
        steps, rows, buffers = 3, 5, self._buffers
        generator = torch.Generator().manual_seed(0)
        ours: Memory = {}
        theirs: Memory = {}
        for name in dict.fromkeys(at.buffer for at in self._slots):
            buffer = buffers[name]
            drawn = self.memory_of(buffer, steps, rows)
            tensor = drawn.both if isinstance(drawn, _Turns) else drawn
            if name in self.own:
                theirs[name] = buffer.empty(rows).zero_()
            else:
                # A matrix as a layer has it, so that the states keep their size.
                scale = buffer.shape[0] ** -0.5 if buffer.rows is Rows.NO and len(buffer.shape) == 2 else 1.0
                numbers = scale * torch.randn(tensor.shape, generator=generator, device="cpu")
                tensor.copy_(numbers > 0 if tensor.dtype == torch.bool else numbers)
                theirs[name] = Turns(list(tensor.clone())) if isinstance(drawn, _Turns) else tensor.clone()
            ours[name] = drawn
        order = range(steps - 1, -1, -1) if any(at.later for i in self._section for at in i.reads) else range(steps)
        with torch.no_grad():
            self(ours, order, rows)
            execute(self._section, buffers, theirs, order, rows, eager=True)
        for name in {write.buffer for i in self._section for write in i.writes}:
            if buffers[name].extent is not Extent.NOW:
                self._compare(name, ours[name], theirs[name])

    def _compare(self, name: str, ours: Any, theirs: Any) -> None:
        if isinstance(ours, _Turns):
            ours, theirs = ours.both, torch.stack(theirs.pair)
        elif name in self._summed:
            ours, theirs = ours.sum(0), theirs.sum(0)
        # By the largest number there is, however small; what cancels out is rounding of numbers around 1.
        scale = float(theirs.float().nan_to_num(0.0, 0.0, 0.0).abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * scale + 1e-6, equal_nan=True)

    def _slot(self, at: At, held: Any, rows: int) -> tuple[int, int, int, int, int, int]:
        """The `Slot` of a value: its address, and the distances in bytes between steps, rows and parts."""
        buffer = self._buffers[at.buffer]
        row = buffer.numel(1) * buffer.dtype.itemsize
        if at.buffer in self.own:
            return held.data_ptr(), 0, 0, 2 * row, 0, 0
        by_row = row if buffer.rows is Rows.YES else 0
        if isinstance(held, _Turns):
            return held.both.data_ptr(), rows * by_row, by_row, 0, 1, at.later or 0
        step = rows * by_row if buffer.extent not in (Extent.ONE, Extent.NOW) else 0
        return held.data_ptr(), step, by_row, 0, 0, at.later or 0


_RUN = """
extern "C" void run(const Slot *slots, const float *const *packed, int64_t start, int64_t steps, int64_t by,
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
