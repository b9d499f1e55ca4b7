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
from multint.errors import EngineError
from tests.catalogue import CELLS, HIDDEN_SIZE, INPUT_SIZE, normal, randomise

# Asked for by name, `fused` takes float64, where a law is exact; `auto` takes it by native loops alone.
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


def inputs(cell: Any, steps: int = 4, rows: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
    """A random input and a random state of the cell."""
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


def right_or_refused(cell: Any, xs: Any, state: Any, engine: str, names: str = "") -> list[Tensor]:
    """The engine gives what the loop gives; only by name may it refuse, by a message that `names` matches.

    Returns the loop's results.
    """
    expected = results(cell, xs, state, "loop")
    try:
        actual = results(cell, xs, state, engine)
    except EngineError as error:
        if engine != "fused" or not re.search(names, str(error)):
            raise
    else:
        close(actual, expected, DTYPES[engine])
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
    close(*outcomes, DTYPES[engine])


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
