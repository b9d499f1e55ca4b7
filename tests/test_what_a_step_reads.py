"""What a step reads and what its program is kept by are the same: no change between two calls goes unseen.

After each change `fused` gives what the loop gives, or refuses by name; `auto` gives what the loop gives.
"""

import array
import collections
import contextlib
import contextvars
import enum
import functools
import gc
import itertools
import logging
import operator
import random
import sys
import threading
import types
import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from multint import GRU, Additive, GRUCell, LSTMCell, MultiplicativeIntegration, explain, scan
from multint.cells import HiddenState
from multint.errors import EngineError
from tests.both_engines import (
    ENGINES,
    Free,
    agree,
    close,
    compare,
    fresh,
    inputs,
    replace_everywhere,
    results,
    right_or_refused,
    stack,
)
from tests.catalogue import HIDDEN_SIZE, INPUT_SIZE, normal, randomise

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("poisoned", "eager", "worth_compiling")]


class Scaled(Free):
    """A step with a factor, which is a function of the cell."""

    def __init__(self, factor=lambda cell: 1.0, input_size=INPUT_SIZE):
        super().__init__(None, input_size)
        self.factor = factor

    def step(self, x, state):
        return HiddenState(self.factor(self) * (x @ self.W + state.h @ self.U).tanh())


class Mode(enum.Enum):
    HALF = 0.5
    DOUBLE = 2.0


@dataclass
class Settings:
    scale: float = 1.0
    inner: dict = field(default_factory=lambda: {"a": [1.0]})


@dataclass(frozen=True)
class FrozenSettings:
    scale: float = 1.0


class Plain:
    """An object of no special kind."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def read(self, cell):
        return self.scale


class Slotted:
    __slots__ = ("scale",)


def times(scale, cell):
    """A factor that depends on its first argument alone."""
    return scale["k"] if isinstance(scale, dict) else scale


class Holding(Scaled):
    """A cell with an attribute of each kind."""

    def __init__(self, factor):
        super().__init__(factor)
        self.inner, self.leaky = nn.Identity(), nn.LeakyReLU()
        self._ws, self._table, self._names = [1.0, 1.0], {"a": [(0, 1.0)]}, {"other"}
        self._array, self.settings = np.ones(HIDDEN_SIZE), Settings()
        self._object, self.slotted, self.objects, self.numbers = Plain(), Slotted(), [Plain()], {"k": 1.0}


def put(path):
    """What puts a value in the place of an attribute."""
    *owners, name = path.split(".")
    return lambda cell, value: setattr(functools.reduce(getattr, owners, cell), name, value)


# A factor, what changes it, and to which values; and for what need not be taken what a refusal says.
TO_TAKE = {
    "a number": (lambda cell: cell.scale, put("scale"), (1.0, 0.5, -2.0, 1.0)),
    "a private number": (lambda cell: cell._k, put("_k"), (1.0, 0.5)),
    "the type of a number": (
        lambda cell: {bool: 0.5, int: 1.0, float: 2.0}[type(cell.flag)],
        put("flag"),
        (1, True, 1.0),
    ),
    "a string in a submodule": (lambda cell: len(cell.inner._mode) / 4, put("inner._mode"), ("half", "double")),
    "a member of an enumeration": (lambda cell: cell.mode.value, put("mode"), Mode),
    "a list in place": (lambda cell: cell._ws[1], lambda cell, value: cell._ws.__setitem__(1, value), (1.0, 0.5)),
    "a dict of lists in place": (
        lambda cell: cell._table["a"][0][1],
        lambda cell, value: cell._table["a"].__setitem__(0, (0, value)),
        (1.0, 0.5),
    ),
    "the order of a dict": (
        lambda cell: next(iter(cell.table.values())),
        put("table"),
        ({"a": 1.0, "b": 0.5}, {"b": 0.5, "a": 1.0}),
    ),
    "an activation": (
        lambda cell: cell.act(cell.a),
        put("act"),
        (torch.tanh, torch.sigmoid, nn.ReLU(), nn.Softplus(), nn.Softplus(beta=3)),
    ),
    "a submodule's setting": (lambda cell: cell.leaky(cell.a), put("leaky.negative_slope"), (0.01, 0.9)),
}
TO_SEE = {
    "a set in place": (
        lambda cell: 0.5 if "half" in cell._names else 1.0,
        lambda cell, value: cell._names.add(value),
        ("other", "half"),
        "_names",
    ),
    "an array in place": (
        lambda cell: float(cell._array[1]),
        lambda cell, value: cell._array.__setitem__(1, value),
        (1.0, 0.5),
        "value",
    ),
    "an array as a constant": (
        lambda cell: torch.as_tensor(cell._array).to(cell.U),
        lambda cell, value: cell._array.__setitem__(1, value),
        (1.0, 0.5),
        "_array|buffer",
    ),
    "a field of a dataclass": (lambda cell: cell.settings.scale, put("settings.scale"), (1.0, 0.5), "settings"),
    "deep within a dataclass": (
        lambda cell: cell.settings.inner["a"][0],
        lambda cell, value: cell.settings.inner["a"].__setitem__(0, value),
        (1.0, 0.5),
        "settings",
    ),
    "a dataclass": (
        lambda cell: cell.settings.scale,
        lambda cell, value: put("settings")(cell, replace(FrozenSettings(), scale=value)),
        (1.0, 0.5, 1.0),
        "settings",
    ),
    "an attribute of an object": (lambda cell: cell._object.scale, put("_object.scale"), (1.0, 0.5), "_object"),
    "an attribute with slots": (lambda cell: cell.slotted.scale, put("slotted.scale"), (1.0, 0.5), "slotted"),
    "an object in a list": (
        lambda cell: cell.objects[0].scale,
        lambda cell, value: setattr(cell.objects[0], "scale", value),
        (1.0, 0.5),
        "objects",
    ),
    "the object of a bound method": (Plain().read, put("factor.__self__.scale"), (1.0, 0.5), "factor|scale"),
    "a partial": (
        None,
        lambda cell, value: put("factor")(cell, functools.partial(times, value)),
        (1.0, 0.5),
        "factor|scale",
    ),
    "an argument within a partial": (
        functools.partial(times, {"k": 1.0}),
        lambda cell, value: cell.factor.args[0].update(k=value),
        (1.0, 0.5),
        "factor|scale",
    ),
    "a keyword of a partial": (
        functools.partial(lambda cell, scale: scale, scale=1.0),
        lambda cell, value: cell.factor.keywords.update(scale=value),
        (1.0, 0.5),
        "factor|scale",
    ),
    "a default argument": (lambda cell, scale=1.0: scale, put("factor.__defaults__"), ((1.0,), (0.5,)), "factor|scale"),
}


def with_attributes(factor, change, values):
    """The row of a cell that holds what its factor reads."""

    def row():
        cell = Holding(factor)
        for value in values:
            change(cell, value)
            yield cell

    return row


# Each row makes a cell, and gives it again after each change of what its step reads. The names are what a refusal says.
TAKEN = {name: with_attributes(*row) for name, row in TO_TAKE.items()}
SEEN = {name: (with_attributes(*row), names) for name, (*row, names) in TO_SEE.items()}


def taken(function):
    """What `fused` must take after every change: what the README says may change between calls."""
    TAKEN[function.__name__] = function
    return function


def seen(names):
    """What `fused` must take or refuse, by a message that the pattern matches."""

    def add(function):
        SEEN[function.__name__] = function, names
        return function

    return add


class ByProperty(Scaled):
    """A property over a private attribute."""

    @property
    def gain(self):
        return 2 * self._gain


@taken
def a_property_over_a_private_attribute():
    cell = ByProperty(lambda cell: cell.gain)
    for cell._gain in (1.0, 0.5):
        yield cell


@taken
def training_and_evaluation():
    cell = Scaled(lambda cell: 2.0 if cell.training else 0.5)
    for mode in (True, False, True):
        yield cell.train(mode)


@taken
def a_buffer_in_place_and_replaced():
    cell = Scaled(lambda cell: cell.seen)
    for number in (1.0, 0.5):
        cell.seen.fill_(number)
        yield cell
    cell.seen = torch.full((HIDDEN_SIZE,), 2.0).to(cell.U)
    yield cell


@taken
def a_parameter_in_place_and_replaced():
    cell = Scaled()
    yield cell
    with torch.no_grad():
        cell.U.mul_(0.5)
    yield cell
    cell.U = nn.Parameter(cell.U.detach() * 3)
    yield cell
    cell.U.data = cell.U.detach() * 0.1
    yield cell
    cell.load_state_dict({name: value * 2 for name, value in cell.state_dict().items()})
    yield cell


class Tied(Free):
    """Three maps of the state."""

    def __init__(self):
        super().__init__(None)
        self.maps = nn.ModuleList(nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE) for _ in range(3))
        randomise(self)

    def step(self, x, state):
        first, second, third = self.maps
        return HiddenState((x @ self.W + first(state.h) - second(state.h) + third(state.h).tanh()).tanh())


@taken
def a_tie_that_moves():
    cell = Tied()
    a, b, c = cell.maps
    b.weight = a.weight
    yield cell
    b.weight = c.weight
    yield cell
    a.weight, b.weight = c.weight, nn.Parameter(a.weight.detach())
    yield cell


@taken
def a_tie_that_moves_and_leaves_the_number_of_tensors():
    """Nothing that is counted or listed tells the two apart."""
    cell = Free(lambda cell, x, h: (x @ cell.W + h @ cell.A - (h @ cell.B).tanh() + (h @ cell.C).sin()).tanh())
    cell.A, cell.B, cell.C = (nn.Parameter(cell.U.detach() * k) for k in (1.0, 2.0, -0.5))
    for name in ("A", "C", "A"):
        cell.B = getattr(cell, name)
        yield cell


@taken
def a_tie_that_the_step_asks_for():
    cell = Free(lambda cell, x, h: (x @ cell.W + h @ cell.V * (2.0 if cell.U is cell.V else 0.5)).tanh())
    cell.V = nn.Parameter(cell.U.detach() * 2)
    yield cell
    cell.V = cell.U
    yield cell


@taken
def a_tie_that_is_added_and_removed():
    cell = Tied()
    a, b, c = cell.maps
    yield cell
    b.weight, c.bias = a.weight, a.bias
    yield cell
    c.weight = a.weight
    yield cell
    b.weight = nn.Parameter(a.weight.detach() * 0.5)
    yield cell
    c.weight, c.bias = nn.Parameter(a.weight.detach() * 2), nn.Parameter(a.bias.detach() * 2)
    yield cell


@taken
def a_tie_of_a_weight_with_its_neighbour():
    """The matrices are told apart by what they are and not by where they stand."""
    cell = Free(lambda cell, x, h: (x @ cell.W + (h @ cell.U) @ cell.V).tanh())
    cell.V = nn.Parameter(cell.U.detach() * 2)
    yield cell
    cell.V = cell.U
    yield cell
    cell.V = nn.Parameter(cell.U.detach() * 0.5)
    yield cell


@taken
def ties_of_a_gru():
    cell = randomise(GRUCell(HIDDEN_SIZE, HIDDEN_SIZE, integrator=Additive))
    f = cell.candidate
    yield cell
    f.x_projection.weight = f.z_projection.weight
    yield cell
    f.x_projection.weight = nn.Parameter(f.z_projection.weight.detach() * 0.5)
    yield cell


@taken
def ties_of_vectors():
    cell = randomise(GRUCell(INPUT_SIZE, HIDDEN_SIZE, integrator=MultiplicativeIntegration))
    f = cell.gates
    yield cell
    f.beta1 = f.alpha
    yield cell
    f.beta2, f.beta1 = f.alpha, nn.Parameter(f.alpha.detach() * 0.5)
    yield cell


@taken
def one_module_under_two_names():
    cell = Tied()
    yield cell
    cell.maps = nn.ModuleList([cell.maps[0], cell.maps[0], cell.maps[2]])
    yield cell
    cell.other = cell.maps[2]
    yield cell
    cell.maps = nn.ModuleList([cell.maps[2]] * 3)
    yield cell


@taken
def a_frozen_weight():
    cell = Scaled(lambda cell: cell.a)
    for wanted in (True, False, True):
        cell.U.requires_grad_(wanted)
        cell.a.requires_grad_(not wanted)
        yield cell


@seen("factor|scale")
def what_a_closure_holds():
    scale = 1.0
    cell = Scaled(lambda cell: scale)
    for scale in (1.0, 0.5):  # noqa: B007
        yield cell


@seen("factor|scale")
def what_a_list_in_a_closure_holds():
    scales = [1.0]
    cell = Scaled(lambda cell: scales[0])
    for scales[0] in (1.0, 0.5):
        yield cell


SCALE = 1.0
SCALES = {"k": 1.0}


class ReadsAGlobal(Scaled):
    def step(self, x, state):
        return HiddenState(SCALE * super().step(x, state).h)


class ReadsWithinAGlobal(Scaled):
    def step(self, x, state):
        return HiddenState(SCALES["k"] * super().step(x, state).h)


@seen("SCALE")
def a_global():
    global SCALE
    cell = ReadsAGlobal()
    for SCALE in (1.0, 0.5, 1.0):  # noqa: B007
        yield cell


@seen("SCALES")
def within_a_global():
    cell = ReadsWithinAGlobal()
    for SCALES["k"] in (1.0, 0.5, 1.0):
        yield cell


def global_scale(cell):
    """A helper that reads a global."""
    return SCALE


@seen("SCALE|factor")
def a_global_of_a_helper():
    global SCALE
    cell = Scaled(lambda cell: global_scale(cell))
    for SCALE in (1.0, 0.5, 1.0):  # noqa: B007
        yield cell


@seen("scale")
def a_class_attribute():
    class Own(Scaled):
        scale = 1.0

    cell = Own(lambda cell: cell.scale)
    for Own.scale in (1.0, 0.5):
        yield cell


@seen("scale")
def a_base_classs_attribute():
    class Base(Scaled):
        scale = 1.0

    class Own(Base):
        pass

    cell = Own(lambda cell: cell.scale)
    for Base.scale in (1.0, 0.5):
        yield cell


@seen("scale")
def an_attribute_that_hides_its_classs():
    class Own(Scaled):
        scale = 1.0

    cell = Own(lambda cell: cell.scale)
    yield cell
    cell.scale = 0.5
    yield cell
    del cell.scale
    yield cell


@seen("scale")
def a_submodules_class_attribute():
    class Inner(nn.Module):
        scale = 1.0

        def forward(self, x):
            return self.scale * x

    cell = Scaled(lambda cell: cell.inner(cell.a))
    cell.inner = Inner()
    for Inner.scale in (1.0, 0.5):
        yield cell


@seen("step")
def a_step_replaced_on_the_class():
    class Own(Scaled):
        pass

    cell = Own()
    yield cell
    Own.step = lambda self, x, state: HiddenState(0.5 * Scaled.step(self, x, state).h)
    yield cell
    del Own.step
    yield cell


@seen("step")
def a_step_replaced_on_the_instance():
    cell = Scaled()
    yield cell
    cell.step = lambda x, state: HiddenState(0.5 * Scaled.step(cell, x, state).h)
    yield cell
    cell.step = lambda x, state: HiddenState(0.1 * Scaled.step(cell, x, state).h)
    yield cell


@seen("forward")
def a_forward_replaced():
    class Inner(nn.Module):
        def forward(self, x):
            return x

    cell = Scaled(lambda cell: cell.inner(cell.a))
    cell.inner = Inner()
    yield cell
    cell.inner.forward = lambda x: 0.5 * x
    yield cell
    del cell.inner.forward
    yield cell
    Inner.forward = lambda self, x: 2 * x
    yield cell


@seen("method|gain")
def a_method_replaced_on_the_class():
    class Own(Scaled):
        def gain(self):
            return 1.0

    cell = Own(lambda cell: cell.gain())
    yield cell
    Own.gain = lambda self: 0.5
    yield cell


@seen("_tables|buffer")
def a_list_of_tensors():
    cell = Scaled(lambda cell: cell._tables[0].to(cell.U))
    cell._tables = [torch.ones(HIDDEN_SIZE)]
    yield cell
    cell._tables[0].fill_(0.5)
    yield cell
    cell._tables[0] = torch.full((HIDDEN_SIZE,), 2.0)
    yield cell


@seen("_tables|buffer")
def a_list_of_tensors_that_want_gradients():
    cell = Scaled(lambda cell: cell._tables["a"].to(cell.U))
    cell._tables = {"a": torch.ones(HIDDEN_SIZE, requires_grad=True)}
    yield cell
    cell._tables["a"].data.fill_(0.5)
    yield cell


@seen("table|buffer")
def a_tensor_that_is_no_buffer():
    cell = Scaled(lambda cell: cell.table.to(cell.U))
    cell.table = torch.ones(HIDDEN_SIZE)
    yield cell
    cell.table.fill_(0.5)
    yield cell
    cell.table = torch.full((HIDDEN_SIZE,), 2.0)
    yield cell


@seen("hidden|buffer")
def a_module_that_is_not_registered():
    cell = Scaled(lambda cell: cell.hidden[0](cell.a))
    cell.hidden = [nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)]
    yield cell
    cell.hidden[0].weight.data.mul_(0.5)
    yield cell
    cell.hidden[0].weight = nn.Parameter(cell.hidden[0].weight.detach() * 3)
    yield cell
    cell.hidden[0] = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE).to(cell.U)
    yield cell


@seen("dtype")
def the_default_dtype():
    cell = Scaled(lambda cell: 2.0 if torch.get_default_dtype() == torch.float64 else 0.5)
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        yield cell


@seen("parametri")
def a_parametrization_of_a_weight():
    cell = Tied()
    yield cell
    nn.utils.parametrizations.weight_norm(cell.maps[0], dim=None)
    with torch.no_grad():
        cell.maps[0].parametrizations.weight.original0.mul_(2.0)
    yield cell


@pytest.fixture(autouse=True)
def globals_restored(monkeypatch):
    """What a row changes of the world stays changed for no other, also where it fails midway."""
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setitem(SCALES, "k", 1.0)
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


NO_MESSAGE = r"\b\B"  # that no text matches
ROWS = {**{name: (row, NO_MESSAGE) for name, row in TAKEN.items()}, **SEEN}


@pytest.mark.parametrize("name", ROWS)
def test_a_change_between_calls_is_seen(name):
    row, names = ROWS[name]
    previous = None
    for cell in row():
        cell.float()
        for value in (v for v in vars(cell).values() if isinstance(v, list)):  # modules that are not registered
            for module in (entry for entry in value if isinstance(entry, nn.Module)):
                module.float()
        expected = right_or_refused(cell, *inputs(cell), names)
        # A change that changes nothing would test nothing.
        if previous is not None and name not in ("a_frozen_weight", "one_module_under_two_names"):
            with pytest.raises(AssertionError):
                close(expected, previous, torch.float32)
        previous = expected


def doubled(module, args, output):
    return 2 * output


def halved_input(module, args):
    return (args[0] / 2,)


def halved_gradient(module, inputs, outputs):
    return tuple(None if gradient is None else gradient / 2 for gradient in inputs)


def halved_output_gradient(module, outputs):
    return tuple(gradient / 2 for gradient in outputs)


every_module = nn.modules.module

HOOKS = {
    "forward": lambda m: m.register_forward_hook(doubled),
    "forward-pre": lambda m: m.register_forward_pre_hook(halved_input),
    "backward": lambda m: m.register_full_backward_hook(halved_gradient),
    "backward-pre": lambda m: m.register_full_backward_pre_hook(halved_output_gradient),
    "global-forward": lambda m: every_module.register_module_forward_hook(doubled),
    "global-forward-pre": lambda m: every_module.register_module_forward_pre_hook(halved_input),
    "global-backward": lambda m: every_module.register_module_full_backward_hook(halved_gradient),
    "global-backward-pre": lambda m: every_module.register_module_full_backward_pre_hook(halved_output_gradient),
}


@pytest.mark.parametrize("before", [False, True], ids=["after-a-call", "before-all-calls"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_heeded_or_refused(kind, before):
    """Whenever they come, and no longer than they stay."""
    cell = Tied().float()
    xs, state = inputs(cell)
    without = results(cell, xs, state, "loop" if before else "auto")
    handle = HOOKS[kind](cell.maps[0])
    try:
        expected = right_or_refused(cell, xs, state, "hook")
        with pytest.raises(AssertionError):
            close(without, expected, torch.float32)
    finally:
        handle.remove()
    for engine in ENGINES:
        close(results(cell, xs, state, engine), without, torch.float32)
        assert explain(cell).engine == "fused"


def test_a_hook_of_a_weight_is_heeded():
    """It belongs to the weight and not to the step: it gets the whole gradient, once."""
    cell = Tied().double()
    compare(cell, 4, 3)
    calls = []
    cell.maps[0].weight.register_hook(lambda gradient: calls.append(1) or gradient / 2)
    compare(cell, 4, 3)
    assert len(calls) == 3


class Counter(Scaled):
    """A step that reads an attribute that others change."""

    def __init__(self, input_size=INPUT_SIZE):
        super().__init__(lambda cell: 1 / (1 + cell.count), input_size)
        self.count = 0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_attribute_that_changes_at_every_call_is_not_traced_for_ever(engine, programs):
    """Under `auto`, which owes nobody a program; and once it stays, the cell is fused again, by name too."""
    cell = fresh(Counter)().float()
    xs, state = inputs(cell)

    def as_the_loop():
        close(results(cell, xs, state, engine), results(cell, xs, state, "loop"), torch.float32)

    for cell.count in range(30 if engine == "auto" else 6):
        as_the_loop()
    assert engine == "fused" or len(programs) <= 10
    before = len(programs)
    for _ in range(5):
        as_the_loop()
    assert explain(cell, xs, state, engine="fused").engine == "fused"
    as_the_loop()
    assert explain(cell).engine == "fused"
    assert len(programs) <= before + 2


def test_attributes_that_take_turns_have_a_program_each(programs):
    cell = fresh(Counter)().float()
    for cell.count in (0, 1, 2) * 3:
        right_or_refused(cell, *inputs(cell), NO_MESSAGE)
        assert explain(cell).engine == "fused"
    assert len(programs) <= 3


def test_an_attribute_that_does_not_equal_itself_is_one_setting(programs):
    cell = fresh(Scaled)(lambda cell: 0.5 if cell.limit != cell.limit else 1.0).double()
    for _ in range(3):
        cell.limit = float("nan")
        compare(cell, 4, 3)
    assert len(programs) == 1


@pytest.mark.parametrize("kind", [LSTMCell, GRUCell])
def test_equal_layers_share_one_program(kind, programs):
    """Each with weights of its own, and with masks one more; so does another stack of the same structure."""
    rnn = stack(fresh(kind), "auto").train()
    xs = normal(4, 3, 2 * HIDDEN_SIZE).float().requires_grad_()
    other = randomise(stack(type(rnn.directions[0].cell), "fused"), seed=1).float()
    for layers in (rnn, other):
        agree(layers, xs)
        assert len(programs) == 1


def test_layers_that_are_not_equal_have_programs_of_their_own():
    """By a weight, which needs none, an attribute, a function, a tie."""
    kind, xs, state = fresh(Counter), normal(3, 2, HIDDEN_SIZE), HiddenState(normal(2, HIDDEN_SIZE))
    cells = [kind(HIDDEN_SIZE).double() for _ in range(5)]
    cells[1].W = nn.Parameter(cells[1].W.detach() * 2)
    cells[2].count = 1
    cells[3].factor = lambda cell: 2.0
    cells[4].W = cells[4].U
    for cell in cells * 2:
        close(scan(cell, xs, state, "fused"), scan(cell, xs, state, "loop"), torch.float64)


def test_a_number_of_numpys_may_change():
    """The first state wants no gradient, and the next ones do: both traces have a tensor of their own for it."""
    cell = Scaled(lambda cell: cell.gain).float()
    xs, state = inputs(cell)
    for cell.gain in (np.float64(1.0), np.float64(0.5)):
        actual, expected = (scan(cell, xs, HiddenState(state.h.detach()), engine) for engine in ("fused", "loop"))
        close(actual, expected, torch.float32)


def test_training_and_evaluation_differ_where_they_do():
    rnn = GRU(INPUT_SIZE, HIDDEN_SIZE, zoneout=0.5, engine="fused").double()
    xs = normal(4, 3, INPUT_SIZE)
    outcomes = {}
    for training in (True, False, True):
        rnn.train(training)
        for rnn.engine in ("fused", "loop"):
            torch.manual_seed(0)
            outcomes[rnn.engine] = rnn(xs)
        close(outcomes["fused"], outcomes["loop"], torch.float64)


def test_kept_programs_are_bounded(monkeypatch, programs):
    """Also while all the cells live; and a cell whose program was dropped is traced again."""
    monkeypatch.setattr("multint.engines.tables.MOST", 2)
    cells = [Free(lambda cell, x, h: (x @ cell.W + h @ cell.U).tanh(), INPUT_SIZE, 3 + i).double() for i in range(4)]
    for _ in range(2):
        for cell in cells:
            xs, state = inputs(cell)
            close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float64)
    watched = [weakref.ref(program) for program, _ in programs]
    programs.clear()
    gc.collect()
    assert len({id(reference()) for reference in watched if reference() is not None}) <= 2


def test_a_kept_program_keeps_no_cell():
    """Neither the one it was traced with, nor its weights, nor what it was given."""
    cell = fresh(LSTMCell)(INPUT_SIZE, HIDDEN_SIZE).double()
    other = type(cell)(INPUT_SIZE, HIDDEN_SIZE).double()
    xs, state = inputs(cell)
    results(cell, xs, state, "fused")
    watched = [weakref.ref(thing) for thing in (cell, *cell.parameters(), xs, *state)]
    del cell, xs, state
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)
    compare(other, 4, 3)


def test_the_kinds_of_inputs_are_a_part_of_what_a_program_is_kept_by():
    """Their dtypes and features, and the names of streams."""
    cell = Free(lambda cell, x, h: (F.pad(x, (0, HIDDEN_SIZE - x.shape[-1])).to(h) + h @ cell.U).tanh()).double()
    state = HiddenState(normal(3, HIDDEN_SIZE))
    for xs in (normal(4, 3, 5), normal(4, 3, 6), normal(4, 3, 5).float(), normal(4, 3, 5) > 0):
        close(scan(cell, xs, state, "fused"), scan(cell, xs, state, "loop"), torch.float64)
    named = Free(lambda cell, x, h: (sum(k * v for k, v in zip((1, 2), x.values(), strict=True)) + h).tanh()).double()
    a, b = normal(4, 3, HIDDEN_SIZE), normal(4, 3, HIDDEN_SIZE, seed=2)
    for streams in ({"a": a, "b": b}, {"b": b, "a": a}, {"a": b, "b": a}):
        close(scan(named, streams, state, "fused"), scan(named, streams, state, "loop"), torch.float64)


SETTINGS = types.ModuleType("settings_of_a_test")
FACTORS = torch.ones(2)


class Hidden:
    __slots__ = ("__by",)

    def __init__(self):
        self.__by = 1.0

    def put(self, value):
        self.__by = value

    def get(self):
        return self.__by


def imported(cell):
    import settings_of_a_test

    return settings_of_a_test.SCALE


def imported_from(cell):
    from settings_of_a_test import SCALE

    return SCALE


def put_scale(cell, value):
    SETTINGS.SCALE = value


CONTEXT = contextvars.ContextVar("scale", default=1.0)
LOCAL = threading.local()


class Setting(enum.Enum):
    SCALE = ("scale",)

    def __init__(self, name):
        self.by = 1.0


class Defaulted(collections.UserDict):
    pass


class Helper:
    """What a step makes anew at each run, by a global."""

    def __init__(self):
        self.by = SETTINGS.SCALE


class Elsewhere(nn.Module):
    def __getattr__(self, name):
        return SETTINGS.SCALE if name == "by" else super().__getattr__(name)


HOLDER = {"user": Defaulted(by=1.0), "array": array.array("d", [1.0]), "default": collections.defaultdict(lambda: 1.0)}


class Method:
    """A helper that is no module, whose methods are replaced on its class."""

    def by(self):
        return 1.0

    @classmethod
    def of_class(cls):
        return 1.0


def replace_method(cell, value):
    Method.by, Method.of_class = lambda self: value, classmethod(lambda cls: value)


def replace_module(cell, value):
    made = types.ModuleType(SETTINGS.__name__)
    made.SCALE = value
    sys.modules[SETTINGS.__name__] = made


@functools.cache
def kept():
    return SETTINGS.SCALE


@torch.compiler.allow_in_graph
def opaque(scale):
    return scale * SETTINGS.SCALE


# A factor in the step, and what gives it another value.
BEYOND = {
    "a method of a helper's class": (lambda cell: cell.helper.by(), replace_method),
    "a class method of a helper": (lambda cell: Method.of_class(), replace_method),
    "a method of a helper that the step makes": (lambda cell: Method().by(), replace_method),
    "the order of an OrderedDict": (
        lambda cell: next(iter(cell.ordered.values())),
        lambda cell, value: cell.ordered.move_to_end("a" if value == 3.0 else "b"),
    ),
    "a ChainMap": (lambda cell: cell.chain["by"], lambda cell, value: cell.chain.update(by=value)),
    "what a cached function has kept": (lambda cell: kept(), put_scale),
    "a module that is imported anew": (imported, replace_module),
    "a name of a module that is imported anew": (imported_from, replace_module),
    "a function that the tracer does not look into": (lambda cell: opaque(cell.U[0]), put_scale),
    "the version of a weight": (lambda cell: float(cell.W._version), lambda cell, value: cell.W.data.add_(0)),
    "a context variable": (lambda cell: CONTEXT.get(), lambda cell, value: CONTEXT.set(value)),
    "a thread's own": (lambda cell: LOCAL.by, lambda cell, value: setattr(LOCAL, "by", value)),
    "a global that a helper's constructor reads": (lambda cell: Helper().by, put_scale),
    "a member of an enumeration": (
        lambda cell: Setting.SCALE.by,
        lambda cell, value: setattr(Setting.SCALE, "by", value),
    ),
    "a module by an attribute's name": (lambda cell: getattr(SETTINGS, cell.key), put_scale),
    "attrgetter": (lambda cell: operator.attrgetter("SCALE")(SETTINGS), put_scale),
    "eval": (lambda cell: eval("SETTINGS.SCALE * 1.0"), put_scale),
    "a UserDict": (lambda cell: HOLDER["user"]["by"], lambda cell, value: HOLDER["user"].update(by=value)),
    "an array": (lambda cell: HOLDER["array"][0], lambda cell, value: HOLDER["array"].__setitem__(0, value)),
    "a default factory": (
        lambda cell: HOLDER["default"]["by"],
        lambda cell, value: HOLDER.update(default=collections.defaultdict(lambda: value)),
    ),
    "__getattr__ of a module": (lambda cell: cell.elsewhere.by, put_scale),
    "a module imported in the step": (imported, put_scale),
    "a name imported in the step": (imported_from, put_scale),
    "a module as an attribute": (lambda cell: cell.settings.SCALE, put_scale),
    "a module by getattr": (lambda cell: getattr(SETTINGS, "SCALE"), put_scale),  # noqa: B009
    "an attribute of a weight": (
        lambda cell: getattr(cell.W, "by", 1.0),
        lambda cell, value: setattr(cell.W, "by", value),
    ),
    "numbers of a tensor": (lambda cell: FACTORS.tolist()[0], lambda cell, value: FACTORS.fill_(value)),
    "a bound method of a dictionary": (lambda cell: cell.look("by"), lambda cell, value: cell.plain.update(by=value)),
    "a private slot": (lambda cell: cell.hidden.get(), lambda cell, value: cell.hidden.put(value)),
    "a deque": (lambda cell: cell.queue[0], lambda cell, value: cell.queue.__setitem__(0, value)),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_lies_beyond_plain_attributes_is_seen_too(name, monkeypatch):
    monkeypatch.setitem(sys.modules, SETTINGS.__name__, SETTINGS)
    factor, change = BEYOND[name]
    cell = fresh(Scaled)(factor).float()
    cell.settings, cell.hidden = SETTINGS, Hidden()
    cell.plain, cell.queue = {"by": 1.0}, collections.deque([1.0])
    cell.look, cell.key, cell.elsewhere = cell.plain.get, "SCALE", Elsewhere()
    cell.helper, cell.ordered = Method(), collections.OrderedDict(a=1.0, b=0.5)
    cell.chain = collections.ChainMap({"by": 1.0})
    for value in (1.0, 3.0):
        change(cell, value)
        right_or_refused(cell, *inputs(cell))


def counted_in_a_closure():
    calls = [0]

    def factor(cell):
        calls[0] += 1
        return 1.0 + calls[0] % 3

    return factor


def drawn_from_a_generator():
    generator = torch.Generator().manual_seed(0)
    return lambda cell: torch.rand(HIDDEN_SIZE, generator=generator).to(cell.U)


def drawn_by_numpy():
    generator = np.random.default_rng(0)
    return lambda cell: float(generator.random())


def drawn_by_python():
    random.seed(0)
    return lambda cell: random.uniform(0.5, 1.0)


def iterated():
    numbers = itertools.count(1.0)
    return lambda cell: next(numbers)


def first_seen():
    seen = []

    def factor(cell):
        seen.append(1.0)
        return seen[0] / len(seen)

    return factor


@pytest.mark.parametrize(
    "make",
    [counted_in_a_closure, drawn_from_a_generator, drawn_by_numpy, drawn_by_python, iterated, first_seen],
    ids=lambda f: f.__name__,
)
def test_what_a_step_keeps_outside_moves_with_its_own_steps_alone(make):
    """Nothing of the step is run to see what it does."""
    xs, state = inputs(Scaled().float())
    expected = results(Scaled(make()).float(), xs, state, "loop")
    for engine in ENGINES:
        cell = Scaled(make()).float()
        with pytest.raises(EngineError) if engine == "fused" else contextlib.nullcontext():
            close(results(cell, xs, state, engine), expected, torch.float32)
        if engine == "fused":
            close(results(cell, xs, state, "loop"), expected, torch.float32)


class Restoring(Scaled):
    """Its attribute has the name of what a layer says to the engine in other words."""

    restored = True

    def step(self, x, state):
        self.count["n"] += 1
        return HiddenState((x @ self.W + state.h @ self.U).tanh() * self.count["n"])


def test_a_cells_own_writes_are_refused_whatever_it_says_of_them():
    cell = Restoring().double()
    cell.count = {"n": 0}
    with pytest.raises(EngineError, match="changes the cell's count"):
        scan(cell, *inputs(cell), "fused")


def test_classes_that_come_and_go_leave_nothing_behind(monkeypatch):
    from multint.engines import guarded

    monkeypatch.setattr("multint.engines.tables.MOST", 2)
    before, watched = set(vars(guarded)), []
    for _ in range(6):
        cell = fresh(Scaled)(lambda cell: 1.0).double()
        results(cell, *inputs(cell), "fused")
        watched.append(weakref.ref(type(cell)))
    del cell
    gc.collect()
    assert set(vars(guarded)) == before
    assert sum(reference() is not None for reference in watched) <= 2


def test_a_refused_step_is_not_traced_at_every_call_and_is_as_soon_as_its_class_changes(monkeypatch):
    class Own(Scaled):
        def step(self, x, state):
            self.count["n"] += 1
            return HiddenState((x @ self.W + state.h @ self.U).tanh())

    traced = []
    replace_everywhere(monkeypatch, "multint.engines.step", "_traced", lambda f: lambda *a: traced.append(1) or f(*a))
    cell = Own().double()
    cell.count = {"n": 0}
    for _ in range(10):
        with pytest.raises(EngineError, match="changes the cell's count"):
            scan(cell, *inputs(cell, dtype=torch.float64), "fused")
    assert len(traced) == 3
    Own.step = Scaled.step
    compare(cell, 4, 3)


def test_parts_that_exchange_all_they_hold():
    class Linears(Scaled):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(INPUT_SIZE, HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

        def step(self, x, state):
            return HiddenState((self.left(x) + self.right(state.h)).tanh())

    cell, other = (randomise(Linears(), seed=seed).float() for seed in (0, 1))
    xs, state = inputs(cell)
    right_or_refused(cell, xs, state)
    for part, new in zip(cell.children(), other.children(), strict=True):
        part.__dict__ = new.__dict__
    right_or_refused(cell, xs, state)


def test_a_state_called_as_a_variable_of_the_script(programs):
    """`output, h = rnn(x, h)`: a global of the same name as an attribute that the step reads is not the step's."""
    cell = fresh(Scaled)().float()
    for engine in ENGINES * 3:
        globals()["h"] = scan(cell, *inputs(cell), engine)[0]
        assert explain(cell).engine == "fused"
    assert len(programs) == 1


def test_a_part_that_copies_itself_in_its_own_way_is_as_it_is():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = 0.5

        def __getstate__(self):
            return {**vars(self), "by": 2.0}

    cell = fresh(Scaled)(lambda cell: cell.part.by).double()
    cell.part = Forgetful()
    compare(cell, 4, 3)


def test_a_frozen_weight_that_is_trained_again_is_seen():
    """Traced while it is frozen, a branch on that is the step's own and not one on whether gradients are recorded."""
    cell = fresh(Scaled)(lambda cell: 2.0 if cell.a.requires_grad else 0.5).float()
    for frozen in (True, False, True):
        cell.a.requires_grad_(not frozen)
        right_or_refused(cell, *inputs(cell))


def test_attributes_that_come_to_rest_are_fused_again(monkeypatch):
    monkeypatch.setattr("multint.engines.step._FREE_MISSES", 1)
    cell = fresh(Scaled)(lambda cell: cell.by).float()
    told = []
    for cell.by in (1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0):
        xs, state = inputs(cell)
        close(results(cell, xs, state, "auto"), results(cell, xs, state, "loop"), torch.float32)
        told.append(explain(cell).engine)
    assert told == ["fused"] * 3 + ["loop"] * 4 + ["fused"] * 2


@pytest.mark.parametrize("used", [False, True])
def test_what_cannot_be_followed_is_refused_only_where_it_is_used(used):
    cell = fresh(Scaled)(lambda cell: 0.5 if used and cell.lock.acquire(blocking=False) else 2.0).double()
    cell.lock, cell.log, cell.table = threading.Lock(), logging.getLogger("multint.test"), torch.eye(3).to_sparse()
    xs, state = inputs(cell)
    if used:
        with pytest.raises(EngineError, match="lock"):
            scan(cell, xs, state, engine="fused")
    else:
        close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float64)
