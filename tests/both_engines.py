"""Both engines side by side: cells of one line, what a scan gives, and the laws that every test of `fused` comes to."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multint import Cell, Recurrent, explain, scan
from multint.cells import HiddenState, LSTMState
from multint.engines import checks
from multint.engines.schedule import At, Call, Contraction, Extent, Product, Schedule
from multint.errors import EngineError
from multint.integrators import outermost_integrators
from tests.catalogue import CELLS, HIDDEN_SIZE, INPUT_SIZE, normal, randomise

# In the order in which they are asked for the same. In float32, since `auto` takes float64 by native loops alone.
ENGINES = ("auto", "fused")
# Where each has a test of its own, `fused` is asked in float64, where a law is exact.
DTYPES = {"fused": torch.float64, "auto": torch.float32}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}

# What turns a step into a program: called once for every structure that is new.
BUILD = ("multint.engines.program", "build")


def built(name: str, dtype: torch.dtype = torch.float64) -> Cell:
    """A catalogued cell with random weights."""
    torch.manual_seed(0)
    return randomise(CELLS[name](INPUT_SIZE, HIDDEN_SIZE)).to(dtype)


def random_state(cell: Any, batch_size: int, dtype: torch.dtype = torch.float64) -> Any:
    """A random state of the cell's form, each field a leaf."""
    state = cell.initial_state(batch_size)
    return type(state)(*(normal(*f.shape, seed=5 + i).to(dtype).requires_grad_() for i, f in enumerate(state)))


def weight(rows: int, columns: int) -> nn.Parameter:
    """A matrix whose numbers depend on its shape alone."""
    return nn.Parameter(normal(rows, columns, seed=rows + columns) / 2)


class Free(Cell):
    """A cell whose step is a function of itself, x and h."""

    def __init__(
        self,
        step: Callable[[Any, Tensor, Tensor], Any],
        input_size: int = INPUT_SIZE,
        hidden_size: int = HIDDEN_SIZE,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.W, self.U = weight(input_size, hidden_size), weight(hidden_size, hidden_size)
        self.a, self.k = nn.Parameter(normal(hidden_size)), nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.function = step

    def step(self, x: Any, state: HiddenState) -> HiddenState:
        return HiddenState(self.function(self, x, state.h))

    def initial_state(self, batch_size: int) -> HiddenState:
        return HiddenState(self.zeros(batch_size, self.hidden_size))


class ConvLSTM(Cell):
    """An LSTM of small images, whose products are convolutions (Shi et al. 2015)."""

    SIDES = (5, 4)

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.gates = nn.Conv2d(input_size + hidden_size, 4 * hidden_size, 3, padding=1)

    def step(self, x: Tensor, state: LSTMState) -> LSTMState:
        i, f, g, o = self.gates(torch.cat([x, state.h], 1)).chunk(4, 1)
        c = f.sigmoid() * state.c + i.sigmoid() * g.tanh()
        return LSTMState(o.sigmoid() * c.tanh(), c)

    def initial_state(self, batch_size: int) -> LSTMState:
        return LSTMState(*(self.zeros(batch_size, self.hidden_size, *self.SIDES) for _ in range(2)))


def fresh(kind: type) -> type:
    """A class of its own that does the same: no program of another test is its."""
    return type(f"Fresh{kind.__name__}", (kind,), {})


def floating(xs: Any) -> list[Tensor]:
    """The streams that have a gradient."""
    return [s for s in (xs.values() if isinstance(xs, dict) else [xs]) if s.requires_grad]


def results(cell: nn.Module, xs: Any, state: Any, engine: str) -> list[Tensor]:
    """Outputs, final state, and the gradients of the input, the initial state and every parameter."""
    output, final = scan(cell, xs, state, engine=engine)
    loss = (output * normal(*output.shape, seed=9).to(output)).sum()
    loss = loss + sum((field * field).sum() for field in final if field.is_floating_point())
    leaves = [*floating(xs), *(f for f in state if f.requires_grad), *(p for p in cell.parameters() if p.requires_grad)]
    if not (leaves and loss.requires_grad):
        return [output, *final]
    return [output, *final, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def inputs(cell: Any, steps: int = 4, rows: int = 3, dtype: torch.dtype | None = None) -> tuple[Tensor, Any]:
    """A random input and a random state of the cell, of its weights' dtype unless another is given."""
    dtype = next(cell.parameters()).dtype if dtype is None else dtype
    xs = normal(steps, rows, cell.input_size).to(dtype).requires_grad_()
    return xs, random_state(cell, rows, dtype)


def close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Equal up to the rounding of a dtype."""
    torch.testing.assert_close(actual, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype], equal_nan=True)


def compare(
    cell: Any, steps: int, rows: int, dtype: torch.dtype = torch.float64, tolerance: float | None = None
) -> None:
    """`fused` takes the cell and gives what the loop gives, also by the kept program."""
    xs, state = inputs(cell, steps, rows, dtype)
    expected = results(cell, xs, state, "loop")
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    for _ in range(2):  # the second call takes the kept program
        actual = results(cell, xs, state, "fused")
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def right_or_refused(cell: Any, xs: Any, state: Any, names: str = "") -> list[Tensor]:
    """Either engine gives what the loop gives; by name it may refuse, by a message that `names` matches.

    `auto` is first: it sees each change of a cell before anybody asks for a program by name.

    Returns the loop's results.
    """
    expected = results(cell, xs, state, "loop")
    for engine in ENGINES:
        try:
            close(results(cell, xs, state, engine), expected, expected[0].dtype)
        except EngineError as error:
            if engine != "fused" or not re.search(names, str(error)):
                raise
        if engine == "auto":
            assert tried(cell), "too small, or of a dtype that auto does not take: nothing was tested"
    return expected


def tried(cell: Any) -> bool:
    """Whether `auto` came to the step itself in the cell's last scan, whatever it found there."""
    reason = explain(cell).reason
    return "multiply-adds" not in reason and "is measured in" not in reason


def stack(kind: Callable[[int, int], Cell], engine: str, **settings: Any) -> Recurrent:
    """Four layers in two directions, of which those above the first are of one structure."""
    torch.manual_seed(0)
    settings = {"num_layers": 4, "bidirectional": True} | settings
    return randomise(Recurrent(2 * HIDDEN_SIZE, HIDDEN_SIZE, kind, engine=engine, **settings).to(DTYPES[engine]))


def agree(rnn: Recurrent, xs: Tensor) -> None:
    """The layers' outputs and gradients are the loop's."""
    engine, outcomes = rnn.engine, []
    for which in (engine, "loop"):
        rnn.engine = which
        output, final = rnn(xs)
        final = final if isinstance(final, tuple) else (final,)
        loss = output.square().sum() + sum(f.sum() for f in final)
        outcomes.append([output, *final, *torch.autograd.grad(loss, [xs, *rnn.parameters()])])
    rnn.engine = engine
    close(*outcomes, xs.dtype)


SECTIONS = ("once", "prologue", "entry", "forward", "reverse", "exit")


def check(schedule: Schedule) -> None:
    """Assert what executors rely on.

    Everything is written before it is read. No instruction reads what it writes over, and no value has two writers,
    except that gradients are added to: the first writer of each, or its clearing, does not add.
    """
    buffers = schedule.buffers
    assert all(name == buffer.name for name, buffer in buffers.items())
    given = {*schedule.inputs.values(), *schedule.invariants, *schedule.literals}
    given |= {schedule.output_gradient, *schedule.fields}.intersection(buffers).difference(schedule.states)
    there = {At(name, None) for name in given} | {At(n) for n in given if buffers[n].extent is Extent.ONE}
    there = check_section([*schedule.once, *schedule.prologue], there, set())
    given |= {at.buffer for at in there}
    there = check_section(schedule.entry, {At(n, later) for n in given for later in (0, None)}, set())
    given |= {at.buffer for at in there}
    fixed = {At(name) for name in given if buffers[name].extent in (Extent.ONE, Extent.EACH, Extent.BLOCK)}
    first = {At(name) for name in schedule.states}
    after = check_section(schedule.forward, fixed | first, set())
    assert {At(name, 1) for name in schedule.states} <= after, "a state is not written"
    if not schedule.reverse:
        return
    there = fixed | first | {at for at in after if at.buffer in schedule.kept}
    carried = {name for name in schedule.summands if buffers[name].extent is Extent.TURNS}
    cleared = {At(name) for name in schedule.cleared}
    constant = {At(name, 1) for name in schedule.cleared if buffers[name].extent is Extent.STATES}
    there |= {At(name, 1) for name in carried} | cleared | constant
    after = check_section(schedule.reverse, there, cleared)
    assert {At(name) for name in carried} <= after, "a state's gradient is not written"
    over_all = {At(at.buffer, None) for at in after if buffers[at.buffer].extent is not Extent.NOW} | after
    after = check_section(schedule.exit, over_all, set())
    assert schedule.summands <= {at.buffer for at in after}, "a gradient is not written"


def check_section(instructions: list[Any], there: set[At], cleared: set[At]) -> set[At]:
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


def is_whole(schedule: Schedule, cell: Cell) -> None:
    """The schedule that gives a cell all its gradients has all that it names, and no weight's gradient in a loop."""
    check(schedule)
    assert schedule.gradients.keys() == set(schedule.arguments)
    instructions = [instruction for section in SECTIONS for instruction in getattr(schedule, section)]
    named = {at.buffer for instruction in instructions for at in (*instruction.reads, *instruction.writes)}
    assert named <= schedule.buffers.keys()
    for instruction in instructions:
        if isinstance(instruction, Call):
            graph = instruction.kernel.module.graph
            assert len([node for node in graph.nodes if node.op == "placeholder"]) == len(instruction.reads)
            assert len(graph.output_node().args[0]) == len(instruction.writes)
    # Each matrix has one contraction after the loop.
    products = [i for i in [*schedule.entry, *schedule.forward] if isinstance(i, Product)]
    contracted = [instruction.result.buffer for instruction in schedule.exit if isinstance(instruction, Contraction)]
    gradients = {gradient for product in products for gradient in schedule.gradients[product.matrix.buffer]}
    assert len(contracted) == len(set(contracted))
    assert gradients.issuperset(contracted)
    recurrent = [cell.get_parameter(f"{k}.{w}") for k, f in outermost_integrators(cell).items() for w in f.z_weights]
    assert contracted or not any(matrix.requires_grad and matrix.ndim == 2 for matrix in recurrent)


@contextlib.contextmanager
def bfloat16_by_default() -> Iterator[None]:
    """What torch makes without a dtype is bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `auto` no scan is too small."""
    monkeypatch.setattr(checks, "_WORTH_COMPILING", 0)


def replace_everywhere(monkeypatch: pytest.MonkeyPatch, module: str, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(original)` in the original's place in its module, and wherever in multint it was imported by name."""
    importlib.import_module("multint.engines.run")  # and all that is only imported where it is used
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, last)
    replacement = make(original)
    for other in [owner, *(m for n, m in list(sys.modules.items()) if n.startswith("multint.") and not path)]:
        if vars(other).get(last) is original:
            monkeypatch.setattr(other, last, replacement)


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The function, which adds what it gives to the list."""

    @functools.wraps(function)
    def count(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls.append(result)
        return result

    assert isinstance(function, types.FunctionType)
    return count


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that are made while the test runs, one for each time that a step is traced."""
    made: list[Any] = []
    replace_everywhere(monkeypatch, *BUILD, lambda original: counted(original, made))
    return made
