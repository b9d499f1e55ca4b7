"""Fields of the state that no step changes, as an encoder's outputs to attend to: one value for all steps."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from multint import Cell, GRUCell, Recurrent, explain, scan
from multint.cells import HiddenState
from multint.engines import run
from multint.engines.schedule import Extent
from tests.both_engines import close, results, weight
from tests.catalogue import normal

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("poisoned")]

X, H, D, S = 3, 4, 5, 6


class Attending(NamedTuple):
    h: Tensor  # (B, H)
    memory: Tensor  # (B, S, D)
    seen: Tensor  # (B, S), bool: what may be attended to
    scale: Tensor  # (B,)


class Decoder(Cell):
    """A GRU that reads, beside its input, what it attends to."""

    def __init__(self, kind="keys", input_size=X, hidden_size=H):
        super().__init__(input_size, hidden_size)
        self.kind = kind
        self.gru = GRUCell(input_size + D, hidden_size)
        self.query, self.key = nn.Linear(hidden_size, D), nn.Linear(D, D)
        self.W = weight(D, hidden_size)

    def step(self, x, state):
        return STEPS[self.kind](self, x, state)

    def attend(self, x, h, keys, memory, seen, scale):
        scores = torch.bmm(keys, self.query(h).unsqueeze(2)).squeeze(2) * scale.unsqueeze(1)
        weights = torch.where(seen, scores, -1e4).softmax(1)
        context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
        return self.gru.step(torch.cat([x, context], 1), HiddenState(h)).h

    def initial_state(self, batch_size):
        zeros = self.zeros(batch_size, self.hidden_size), self.zeros(batch_size, S, D)
        return Attending(*zeros, zeros[0].new_ones(batch_size, S).bool(), self.zeros(batch_size))


def of_two(self, x, s):
    """A product and a sum that depend on the fields alone, and one that reads them at every step."""
    row = s.memory[:, 0] @ self.W + s.scale.unsqueeze(1) * s.memory.sum((1, 2)).unsqueeze(1)
    return s._replace(h=(row * s.h).tanh() + (s.memory[:, 1] * x[:, :1]) @ self.W)


STEPS = {
    "keys": lambda c, x, s: s._replace(h=c.attend(x, s.h, c.key(s.memory).tanh(), s.memory, s.seen, s.scale)),
    "of two": of_two,
    "detached": lambda c, x, s: s._replace(h=s.h.tanh() + s.memory.detach()[:, 0, :H] * x[:, :1]),
    "unread": lambda c, x, s: s._replace(h=s.h.tanh() * x[:, :1]),
    "counted": lambda c, x, s: s._replace(h=s.h + (s.memory * s.memory.new_ones(len(x), 1, D)).mean(1)[:, :H]),
    "changed": lambda c, x, s: s._replace(h=s.h + s.memory[:, 0, :H], memory=s.memory * 0.5, scale=s.scale + 0),
}
LASTING = {kind: {"memory", "seen", "scale"} for kind in STEPS} | {"changed": {"seen"}}


def arguments(dtype, steps=4, rows=3):
    xs, h, memory, scale = (
        normal(*shape, seed=i).to(dtype).requires_grad_()
        for i, shape in enumerate([(steps, rows, X), (rows, H), (rows, S, D), (rows,)])
    )
    seen = normal(rows, S, seed=7) > -0.5
    seen[:, 0] = True
    return xs, Attending(h, memory, seen, scale)


def lasting(schedule):
    return {n for n in schedule.fields if schedule.buffers[n].extent is Extent.ONE}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.usefixtures("eager")
def test_results_and_gradients_are_the_loops(kind, monkeypatch):
    cell = Decoder(kind).double()
    xs, state = arguments(torch.float64)
    expected = results(cell, xs, state, "loop")
    close(results(cell, xs, state, "fused"), expected, torch.float64)
    assert lasting(explain(cell)._program.forward) == LASTING[kind]
    monkeypatch.setattr(run, "MEMORY_BUDGET", 1)  # a step at a time, each run twice
    close(results(cell, xs, state, "fused"), expected, torch.float64)


@pytest.mark.parametrize("kind", ["keys", "of two"])
def test_native_code(kind):
    cell = Decoder(kind).float()
    xs, state = arguments(torch.float32, steps=5, rows=4)
    close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float32)
    assert "Python" not in explain(cell).plan


@pytest.mark.usefixtures("eager")
def test_gradients_of_gradients():
    cell = Decoder("of two").double()
    xs, state = arguments(torch.float64, steps=2, rows=2)

    def run(xs, h, memory, scale):
        output, final = scan(cell, xs, Attending(h, memory, state.seen, scale), "fused")
        return output, final.h, final.memory

    assert torch.autograd.gradgradcheck(run, (xs, state.h, state.memory, state.scale), fast_mode=True)


@pytest.mark.usefixtures("eager")
def test_what_depends_on_such_a_field_alone_is_computed_once():
    xs, state = arguments(torch.float64)
    program = explain(Decoder().double(), xs, state, "fused")._program
    *_, keys = program.forward.once
    assert "memory" in [at.buffer for at in keys.reads]
    assert not any("key" in at.buffer for i in program.forward.forward for at in i.reads)
    large = [b for b in program.whole().buffers.values() if b.shape == (S, D)]
    assert large
    assert all(b.extent is Extent.ONE for b in large)


@pytest.mark.usefixtures("eager")
def test_only_the_field_has_a_gradient():
    cell = Decoder("of two").double().requires_grad_(False)
    xs, state = arguments(torch.float64)
    xs, state = xs.detach(), state._replace(h=state.h.detach(), scale=state.scale.detach())
    outcomes = []
    for engine in ("loop", "fused"):
        output, final = scan(cell, xs, state, engine)
        assert [f.requires_grad for f in final] == [True, True, False, False]
        (gradient,) = torch.autograd.grad(output.square().sum() + final.memory.square().sum(), state.memory)
        outcomes.append([output, *final, gradient])
    close(*outcomes, torch.float64)


class Swapped(NamedTuple):
    h: Tensor
    a: Tensor
    b: Tensor


class Swapping(Cell):
    """Fields that stand in other places after a step."""

    def __init__(self, order):
        super().__init__(H, H)
        self.order = order

    def step(self, x, state):
        return Swapped(*((*state, state.h * x + state.a)[i] for i in self.order))

    def initial_state(self, batch_size):
        return Swapped(*(self.zeros(batch_size, H) for _ in range(3)))


@pytest.mark.parametrize(
    ("order", "fields"), [((3, 2, 1), set()), ((3, 1, 1), {"a"}), ((0, 1, 3), {"a"}), ((3, 0, 2), {"b"})]
)
@pytest.mark.usefixtures("eager")
def test_a_field_in_the_place_of_another_changes(order, fields):
    """The first field is the output: it has a value for each step, whatever it is."""
    cell = Swapping(order).double()
    xs, *state = (normal(*shape, seed=i, requires_grad=True) for i, shape in enumerate([(4, 3, H), *[(3, H)] * 3]))
    state = Swapped(*state)
    close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float64)
    assert lasting(explain(cell)._program.forward) == fields


@pytest.mark.usefixtures("eager")
def test_a_layer_keeps_such_a_field_through_its_masks():
    rnn = Recurrent(X, H, lambda input_size, hidden_size: Decoder("of two", input_size, hidden_size)).double()
    xs, state = arguments(torch.float64)
    outcomes = []
    for rnn.engine in ("loop", "fused"):
        output, final = rnn(xs, [field.unsqueeze(0) for field in state], lengths=[4, 1, 3])
        leaves = [xs, state.h, state.memory, state.scale, *rnn.parameters()]
        gradients = torch.autograd.grad(output.sum() + final.memory.square().sum(), leaves, allow_unused=True)
        outcomes.append([output, *final, *gradients])
    close(*outcomes, torch.float64)
    assert lasting(rnn.explain()[0]._program.forward) == {"memory", "seen", "scale"}
