"""A witness never says that all is as it was where a new walk would differ; the library's cells have one each."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from multint import Additive, LSTMCell, MultiplicativeIntegration, scan
from multint.cells import LSTMState
from multint.engines.cache import _histories
from multint.engines.reads import Walk, contents_of
from tests.both_engines import built
from tests.catalogue import CELLS, HIDDEN_SIZE, INPUT_SIZE, normal


def seen(walk):
    return walk.key, list(map(id, walk.tensors))


@pytest.mark.parametrize("name", [name for name in CELLS if not name.startswith("own-")])
def test_the_librarys_cells_have_complete_witnesses(name):
    cell = built(name)
    walk = Walk(cell)
    assert walk.witness.is_complete
    assert walk.witness.holds(contents_of)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(1.0)
    assert walk.witness.holds(contents_of), "numbers are no part of a program"


class Louder(LSTMCell):
    def step(self, x, state):
        return type(state)(*(2 * field for field in super().step(x, state)))


def patched(kind, name):
    def change(cell, monkeypatch):
        monkeypatch.setattr(kind, name, lambda *arguments: None, raising=False)

    return change


CHANGES = {
    "a parameter is another one": lambda c, m: setattr(c.gates, "alpha", nn.Parameter(c.gates.alpha.detach().clone())),
    "a parameter is tied": lambda c, m: setattr(c.gates, "alpha", c.gates.beta1),
    "a parameter is gone": lambda c, m: setattr(c.gates, "bias", None),
    "a parameter has another dtype": lambda c, m: setattr(c.gates.alpha, "data", c.gates.alpha.data.float()),
    "a parameter has another order": lambda c, m: setattr(
        c.gates.z_projection.weight, "data", c.gates.z_projection.weight.data.t().contiguous().t()
    ),
    "a parameter is not learnt": lambda c, m: c.gates.alpha.requires_grad_(False),
    "a parameter has an attribute": lambda c, m: setattr(c.gates.alpha, "scale", 2.0),
    "it is in evaluation": lambda c, m: c.gates.eval(),
    "an attribute is new": lambda c, m: setattr(c, "scale", 2.0),
    "an attribute has another value": lambda c, m: setattr(c.gates, "x_features", 77),
    "an entry of a list": lambda c, m: c.names.append("other"),
    "an entry of a list in a list": lambda c, m: c.names[0].append("other"),
    "an entry of a dictionary": lambda c, m: c.numbers.update(a=2),
    "a key of a dictionary": lambda c, m: c.numbers.update(b=c.numbers.pop("a")),
    "a key that equals another one": lambda c, m: c.hooks.update({True: c.hooks.pop(1)}),
    "a method of its own": lambda c, m: setattr(c, "step", lambda x, state: state),
    "a part has another class": lambda c, m: setattr(c.gates, "__class__", Additive),
    "a hook": lambda c, m: c.gates.register_forward_hook(lambda *arguments: None),
    "a buffer": lambda c, m: c.register_buffer("more", torch.zeros(1)),
    "a part": lambda c, m: c.add_module("more", nn.Identity()),
    "a method of the class": patched(LSTMCell, "step"),
    "a method of the integrator's class": patched(MultiplicativeIntegration, "integrate"),
    "a method of the state's class": patched(LSTMState, "__add__"),
    "a new function of a class": patched(LSTMCell, "more"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_change_goes_unseen(name, monkeypatch):
    cell = built("lstm-mi")
    cell.names, cell.numbers, cell.hooks = [["one"]], {"a": 1}, {1: "a"}
    walk = Walk(cell, LSTMState)
    assert walk.witness.is_complete
    assert walk.witness.holds(contents_of)
    CHANGES[name](cell, monkeypatch)
    assert not walk.witness.holds(contents_of)
    assert seen(Walk(cell, LSTMState)) != seen(walk)


class Own(LSTMCell):
    """A user's cell, whose code is followed at every call."""


INCOMPLETE = {
    "a user's class": lambda cell: None,
    "a function": lambda cell: setattr(cell, "function", lambda x: x),
    "an array": lambda cell: setattr(cell, "array", normal(2).numpy()),
    "a set": lambda cell: setattr(cell, "some", {1}),
    "a bound method": lambda cell: setattr(cell, "append", [].append),
    "the cell itself": lambda cell: setattr(cell, "me", [cell]),
    "a hook of a parameter": lambda cell: cell.gates.alpha.register_hook(lambda gradient: gradient),
    "a thread": lambda cell: setattr(cell, "worker", threading.Thread(target=cell.step)),
    "an iterator": lambda cell: setattr(cell, "parts", cell.modules()),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_what_has_no_witness(name):
    kind = Own if name == "a user's class" else LSTMCell
    cell = kind(INPUT_SIZE, HIDDEN_SIZE).double()
    INCOMPLETE[name](cell)
    assert not Walk(cell, LSTMState).witness.is_complete


def test_a_cell_of_another_class_has_another_program():
    cell = LSTMCell(INPUT_SIZE, HIDDEN_SIZE)
    xs, state = normal(3, 2, INPUT_SIZE).float(), cell.initial_state(2)
    with torch.no_grad():
        scan(cell, xs, state, "fused")
        cell.__class__ = Louder
        torch.testing.assert_close(scan(cell, xs, state, "fused"), scan(cell, xs, state, "loop"))


def test_it_keeps_no_cell_alive():
    cell = LSTMCell(INPUT_SIZE, HIDDEN_SIZE).double()
    for _ in range(2):
        scan(cell, normal(3, 2, INPUT_SIZE), cell.initial_state(2), "fused")
    assert _histories[cell].walked is not None
    there = weakref.ref(cell)
    del cell
    gc.collect()
    assert there() is None
