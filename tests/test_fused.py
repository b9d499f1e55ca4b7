"""The engine `fused` against the loop: the same outputs and all the same gradients, for whatever it takes."""

import copy
import gc
import pickle
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multint import Additive, Cell, GRUCell, Hadamard, LSTMCell, MultintError, Recurrent, explain, scan
from multint.cells import HiddenState, LSTMState
from multint.engines import checks, run
from multint.engines.kernel import eager_pieces
from multint.engines.program import Program
from multint.errors import EngineError, OptionError
from tests.both_engines import Free, built, close, compare, fresh, inputs, random_state, results, weight
from tests.catalogue import CELLS, HIDDEN_SIZE, IN_CELLS, INPUT_SIZE, LAYERS, layer, normal, randomise

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("poisoned")]


MODES = {
    "bidirectional": LAYERS["bidirectional"],  # and stacked
    "zoneout": LAYERS["zoneout"],
    "lengths": {"bidirectional": True},
    "reset": {},
    "noise": {"zoneout": 0.3, "state_dropout": 0.3, "input_dropout": 0.3, "weight_drop": 0.3, "weight_noise": 0.1},
}


# All modes for one cell, and all masks at once for others.
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("name", "mode"), [*(("lstm-projected", mode) for mode in MODES), ("gru-mi", "noise"), ("own-leaky", "noise")]
)
def test_layers(name, mode):
    torch.manual_seed(0)
    rnn = randomise(Recurrent(INPUT_SIZE, HIDDEN_SIZE, CELLS[name], **MODES[mode]).double())
    rnn.train(mode == "noise")
    arguments = {"lengths": [5, 2, 4]} if mode in ("lengths", "noise") else {}
    if mode in ("reset", "noise"):
        arguments["reset"] = normal(5, 3) > 0.5
    outcomes = []
    for engine in ("loop", "fused"):
        xs = normal(5, 3, INPUT_SIZE, requires_grad=True)
        rnn.engine = engine
        rnn.zero_grad()
        torch.manual_seed(3)
        output, final = rnn(xs, **arguments)
        (output.square().sum() + sum(f.sum() for f in ((final,) if isinstance(final, Tensor) else final))).backward()
        outcomes.append([output, final, xs.grad, *(p.grad for p in rnn.parameters() if p.requires_grad)])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", ["rnn-mi", "lstm-mi", "lstm-norm", "gru-mi", "gru-after", "own-leaky"])
def test_gradients_of_gradients(name):
    cell = built(name)
    xs, state = normal(3, 2, INPUT_SIZE, requires_grad=True), random_state(cell, 2)

    def run(xs, *state):
        output, final = scan(cell, xs, type(cell.initial_state(1))(*state), engine="fused")
        return output, *final

    assert torch.autograd.gradcheck(run, (xs, *state), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (xs, *state), fast_mode=True)


class ComposedState(NamedTuple):
    h: Tensor
    a: Tensor
    b: Tensor


GATES = (torch.sigmoid, torch.tanh, torch.relu, lambda v: v, lambda v: v.square().sum(-1, keepdim=True).sqrt() + v)


class Composed(Cell):
    """A cell put together at random: maps, gates, and updates that read any of three states of their own widths."""

    def __init__(self, maps, gates, mixes):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.widths = (HIDDEN_SIZE, 4, 6)
        self.maps = nn.ModuleList(
            IN_CELLS[name](INPUT_SIZE, self.widths[source], self.widths[target])
            for target, (name, source) in enumerate(maps)
        )
        self.cross = weight(6, HIDDEN_SIZE)
        self.gates, self.mixes, self.sources = gates, mixes, [source for _, source in maps]

    def step(self, x, state):
        new = [
            GATES[gate](f(x, state[source]))
            for f, gate, source in zip(self.maps, self.gates, self.sources, strict=True)
        ]
        a = new[1] if self.mixes[0] else 0.5 * state.a + new[1] * state.a
        b = new[2] * a.mean(-1, keepdim=True) if self.mixes[1] else new[2]
        h = new[0] + (b @ self.cross if self.mixes[2] else state.h * a.sum(-1, keepdim=True).tanh())
        return ComposedState(h.tanh(), a.tanh(), b.tanh())

    def initial_state(self, batch_size):
        return ComposedState(*(self.zeros(batch_size, width) for width in self.widths))


@pytest.mark.usefixtures("eager")
@given(
    maps=st.tuples(*[st.tuples(st.sampled_from(sorted(IN_CELLS)), st.integers(0, 2)) for _ in range(3)]),
    gates=st.tuples(*[st.integers(0, len(GATES) - 1) for _ in range(3)]),
    mixes=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=5, deadline=None)
def test_cells_composed_at_random(maps, gates, mixes):
    torch.manual_seed(0)
    cell = randomise(Composed(maps, gates, mixes)).double()
    xs, state = normal(3, 2, INPUT_SIZE, requires_grad=True), random_state(cell, 2)
    actual, expected = (results(cell, xs, state, engine) for engine in ("fused", "loop"))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("eager")
def test_another_length_or_batch_takes_the_kept_program(programs):
    cell = fresh(LSTMCell)(INPUT_SIZE, HIDDEN_SIZE)
    for steps, rows in ((3, 2), (5, 2), (3, 4), (1, 1)):
        scan(cell, torch.randn(steps, rows, INPUT_SIZE), cell.initial_state(rows), engine="fused")
    assert len(programs) == 1


@pytest.mark.usefixtures("no_inductor")
class TestAutograd:
    """What autograd may do with a result."""

    def test_truncated_back_propagation(self):
        cell = built("lstm-mi")
        xs = normal(6, 2, INPUT_SIZE, requires_grad=True)
        whole, _ = scan(cell, xs, cell.initial_state(2), engine="loop")
        (expected,) = torch.autograd.grad(whole[3:].sum(), xs)
        _, carried = scan(cell, xs[:3], cell.initial_state(2), engine="fused")
        second, _ = scan(cell, xs[3:], carried, engine="fused")
        (actual,) = torch.autograd.grad(second.sum(), xs)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    def test_two_forwards_before_one_backward_and_a_second_backward(self):
        cell = built("gru-mi")
        one, two = normal(4, 2, INPUT_SIZE), normal(5, 3, INPUT_SIZE, seed=2)
        gradients = []
        for engine in ("loop", "fused"):
            first, _ = scan(cell, one, cell.initial_state(2), engine=engine)
            second, _ = scan(cell, two, cell.initial_state(3), engine=engine)
            loss = first.sum() * second.sum()
            parameters = list(cell.parameters())
            once = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradients.append([*once, *torch.autograd.grad(loss, parameters)])
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)

    def test_weights_shared_by_two_scans_and_frozen_ones(self):
        cell = built("lstm-mi")
        cell.gates.z_projection.weight.requires_grad_(False)
        cell.gates.alpha.requires_grad_(False)
        xs = normal(4, 2, INPUT_SIZE)
        gradients = []
        for engine in ("loop", "fused"):
            cell.zero_grad()
            first, _ = scan(cell, xs, cell.initial_state(2), engine=engine)
            second, _ = scan(cell, first[..., :INPUT_SIZE], cell.initial_state(2), engine=engine)
            second.sum().backward()
            gradients.append([p.grad for p in cell.parameters()])
        assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
        for ours, theirs in zip(*gradients, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    def test_inputs_that_are_not_contiguous(self):
        cell = built("gru-after")
        xs = normal(2, 6, 2 * INPUT_SIZE)[..., ::2].transpose(0, 1)
        expected, _ = scan(cell, xs, cell.initial_state(2), engine="loop")
        actual, _ = scan(cell, xs, cell.initial_state(2), engine="fused")
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode):
        cell = built("lstm-mi")
        xs = normal(4, 2, INPUT_SIZE)
        expected, last = scan(cell, xs, cell.initial_state(2), engine="loop")
        with mode():
            actual, final = scan(cell, xs, cell.initial_state(2), engine="fused")
            assert not actual.requires_grad
            torch.testing.assert_close((actual, *final), (expected, *last), rtol=1e-10, atol=1e-10)
        # What was traced in that mode serves others as well.
        scan(cell, xs, cell.initial_state(2), engine="fused")[0].sum().backward()
        assert cell.gates.alpha.grad is not None

    def test_same_seed_same_result(self):
        outcomes = []
        for _ in range(2):
            cell = built("lstm-mi")
            outcomes.append(results(cell, normal(4, 2, INPUT_SIZE, requires_grad=True), random_state(cell, 2), "fused"))
        torch.testing.assert_close(*outcomes, rtol=0, atol=0)

    def test_copies_and_pickles_after_a_run(self):
        rnn = Recurrent(INPUT_SIZE, HIDDEN_SIZE, partial(LSTMCell, integrator=Additive), engine="fused").double()
        xs = normal(4, 2, INPUT_SIZE)
        expected, _ = rnn(xs)
        for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
            torch.testing.assert_close(other(xs)[0], expected, rtol=0, atol=0)

    # Dynamo warns of what it does itself: it makes an autograd function, and looks at a result's .grad.
    @pytest.mark.filterwarnings("default")
    def test_inside_torch_compile(self):
        rnn = layer("lstm-mi", engine="fused")
        xs = normal(4, 2, INPUT_SIZE)
        expected, _ = rnn(xs)
        torch.testing.assert_close(torch.compile(rnn, backend="eager")(xs)[0], expected, rtol=1e-10, atol=1e-10)

    def test_under_checkpointing(self):
        cell = built("lstm-mi")
        xs, gradients = normal(4, 2, INPUT_SIZE, requires_grad=True), []
        for engine in ("loop", "fused"):
            output = checkpoint(
                lambda xs, e=engine: scan(cell, xs, cell.initial_state(2), e)[0], xs, use_reentrant=False
            )
            gradients.append(torch.autograd.grad(output.square().sum(), [xs, *cell.parameters()]))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)

    def test_gradients_of_some_leaves(self):
        cell = built("gru-mi")
        xs = normal(4, 2, INPUT_SIZE, requires_grad=True)
        for leaves in ([xs], [cell.gates.alpha], [cell.gates.z_projection.weight]):
            gradients = [
                torch.autograd.grad(scan(cell, xs, cell.initial_state(2), engine)[0].square().sum(), leaves)
                for engine in ("loop", "fused")
            ]
            torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)

    def test_functional_calls_use_the_given_weights(self):
        rnn, other = layer("gru-mi", engine="fused"), layer("gru-mi", engine="loop")
        for parameter in other.parameters():
            parameter.data.mul_(1.5)
        xs = normal(4, 2, INPUT_SIZE)
        output, _ = torch.func.functional_call(rnn, dict(other.named_parameters()), (xs,))
        torch.testing.assert_close(output, other(xs)[0], rtol=1e-10, atol=1e-10)


class Odd(Cell):
    """A cell with one line of its own in the step."""

    def __init__(self, line):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.meet = Hadamard(INPUT_SIZE, HIDDEN_SIZE, HIDDEN_SIZE)
        self.line = line

    def step(self, x, state):
        return HiddenState(self.line(self.meet(x, state.h), state.h))

    def initial_state(self, batch_size):
        return HiddenState(self.zeros(batch_size, HIDDEN_SIZE))


class CountingState(NamedTuple):
    h: Tensor
    steps: Tensor


class Counting(Odd):
    """A cell whose state has no derivative in one field."""

    def step(self, x, state):
        return CountingState(self.meet(x, state.h).tanh(), state.steps + 1)

    def initial_state(self, batch_size):
        return CountingState(self.zeros(batch_size, HIDDEN_SIZE), torch.zeros(batch_size, dtype=torch.long))


@pytest.mark.usefixtures("eager")
def test_a_state_without_derivative():
    cell = Counting(None).double()
    xs, gradients = normal(4, 2, INPUT_SIZE, requires_grad=True), []
    for engine in ("loop", "fused"):
        output, final = scan(cell, xs, cell.initial_state(2), engine=engine)
        assert final.steps.tolist() == [4, 4]
        leaves = [xs, *cell.parameters()]
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        gradients.append([*first, *torch.autograd.grad(first[0].square().sum(), leaves, materialize_grads=True)])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def stepping(cell, x, h):
    cell.seen = cell.seen + 1
    return h + cell.seen


def counting(cell, x, h):
    cell.seen.add_(1)
    return h + 1.0


def noting(cell, x, h):
    cell.last = h
    return h + 1.0


def without_gradient(cell, x, h):
    with torch.no_grad():
        y = h.square()
    return y + x @ cell.W


def hooked(cell, x, h):
    y = (h @ cell.U).tanh()
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    return y


def writing(cell, x, h):
    h.mul_(2)
    return x @ cell.W + h


REFUSED_STEPS = {
    "changes the cell": stepping,
    "changes the cell|writes to": counting,
    "changes the cell; keep it in the state": noting,
    "writes to one of its inputs|fails when it is traced": writing,
    "turns gradients on or off": without_gradient,
    "registers a hook|an autograd.Function": hooked,  # which is what torch 2.12 shows of it
    "the step draws random numbers": lambda cell, x, h: nn.functional.dropout(x @ cell.W + h, 0.5),
    "the step branches on a value": lambda cell, x, h: x @ cell.W + h if h.sum() > 0 else h,
    r"rows may interact: .*aten\.sum": lambda cell, x, h: (x + 3e-4 * x.mean(0)) @ cell.W + h,
    r"rows may interact: .*aten": lambda cell, x, h: torch.where(x > 9, x.mean(0), x) @ cell.W + h,
    "the step branches on the number of rows": lambda cell, x, h: (h @ cell.U) * (1.0 if x.shape[0] != 5 else 2.0),
    r"rows may interact: .*aten.*batch_norm": lambda cell, x, h: (
        nn.functional.batch_norm(x, None, None, training=True) @ cell.W
    ),
    "aten.view_as_real": lambda cell, x, h: torch.view_as_real(torch.complex(h, h) * 1j).sum(-1),
}


@pytest.mark.usefixtures("worth_compiling")
@pytest.mark.parametrize("message", REFUSED_STEPS)
def test_what_a_graph_would_hide_is_refused_by_name_and_looped_under_auto(message):
    """A refusal leaves the cell and its state as they were."""
    cell = Free(REFUSED_STEPS[message]).float()
    xs, state = torch.randn(4, 3, INPUT_SIZE), HiddenState(torch.randn(3, HIDDEN_SIZE))
    other, attributes, h = copy.deepcopy(cell), {**vars(cell)}, state.h.clone()
    for _ in range(2):
        with pytest.raises(EngineError, match=message):
            scan(cell, xs, state, engine="fused")
    assert explain(cell, xs, engine="fused").engine == "loop"
    assert vars(cell) == attributes
    assert float(cell.seen) == 0
    assert torch.equal(state.h, h)
    outputs = []
    for engine, one in (("auto", cell), ("loop", other)):
        torch.manual_seed(0)
        outputs.append(scan(one, xs, HiddenState(h.clone()), engine)[0])
    assert re.search(message, explain(cell).reason)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


TAKEN_STEPS = {
    "chained": lambda cell, x, h: ((h @ cell.U) @ cell.U).tanh() + (x @ cell.W) @ cell.U,
    "tied": lambda cell, x, h: (h @ cell.U).tanh() @ cell.U + cell.U.diagonal() * h + x @ cell.W,
    "reshaped": lambda cell, x, h: (h.reshape(-1, 1, HIDDEN_SIZE) * cell.a).flatten(1) + (cell.a * x.mean(-1, True)),
    "transposed": lambda cell, x, h: (cell.a.unsqueeze(-1) * h.t()).t() + x @ cell.W,
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", TAKEN_STEPS)
def test_unusual_products_and_vectors(name):
    compare(Free(TAKEN_STEPS[name]).double(), 4, 3)


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", ["tied", "carried", "stacked", "cut"])
def test_gradients_of_gradients_where_arguments_depend_on_each_other(name, monkeypatch):
    cell = Free(TAKEN_STEPS["tied"]).double() if name == "tied" else built("lstm-mi")
    if name == "cut":
        monkeypatch.setattr(run, "MEMORY_BUDGET", 1)
    xs, outcomes = normal(4, 2, INPUT_SIZE, requires_grad=True), []
    for engine in ("loop", "fused"):
        output, state = scan(cell, xs, random_state(cell, 2), engine)
        if name == "carried":
            output, _ = scan(cell, xs, state, engine)
        if name == "stacked":
            output, _ = scan(cell, output[..., :INPUT_SIZE], state, engine)
        leaves = [xs, *cell.parameters()]
        options = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True, **options)
        outcomes.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves, **options)])
    torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("eager")
def test_streams_go_by_their_names_and_not_by_their_order():
    cell = Free(lambda cell, x, h: (x["a"] @ cell.U * x["b"] + h @ cell.U - x["b"]).tanh()).double()
    a, b, state = normal(4, 3, HIDDEN_SIZE), normal(4, 3, HIDDEN_SIZE, seed=2), random_state(cell, 3)
    for xs in ({"a": a, "b": b}, {"b": b, "a": a}):
        close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float64)


@pytest.mark.usefixtures("eager")
def test_another_activation_or_shape_of_a_weight_is_traced_again():
    cell = Free(lambda cell, x, h: cell.act(h * cell.a + x @ cell.W)).double()
    for cell.act in (nn.Tanh(), nn.Sigmoid()):
        compare(cell, 3, 2)
    cell.a = nn.Parameter(normal(1))
    compare(cell, 3, 2)


@pytest.mark.usefixtures("no_inductor")
def test_first_calls_from_several_threads():
    """While one traces, the others wait, or trace another structure after it."""
    cells = [fresh(kind)(INPUT_SIZE, HIDDEN_SIZE).double() for kind in (GRUCell, GRUCell, LSTMCell)]
    given = [(cell, *inputs(cell)) for cell in cells]
    expected = [results(*some, "loop") for some in given]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: results(*given[i % 3], "fused"), range(12)))
    for i, actual in enumerate(found):
        close(actual, expected[i % 3], torch.float64)


def test_a_refused_cell_keeps_no_inputs():
    cell = Odd(lambda y, h: y - y.mean(0))
    xs = torch.randn(4, 3, INPUT_SIZE)
    watched = weakref.ref(xs)
    with pytest.raises(EngineError):
        scan(cell, xs, cell.initial_state(3), engine="fused")
    del xs
    gc.collect()
    assert watched() is None


def test_constants_of_the_batch_s_size_are_taken():
    cell = Odd(lambda y, h: y + torch.zeros(y.shape[0], 1) + torch.ones_like(h)).double()
    with eager_pieces():
        compare(cell, 4, 3)


def test_function_transforms_take_the_loop():
    cell = built("lstm-mi")
    xs = normal(4, 2, INPUT_SIZE)
    weights = dict(cell.named_parameters())

    def loss(weights, engine):
        outer = Recurrent(INPUT_SIZE, HIDDEN_SIZE, lambda *_: cell, engine=engine).eval()
        named = {f"directions.0.cell.{name}": value for name, value in weights.items()}
        return torch.func.functional_call(outer, named, (xs,))[0].square().sum()

    expected = torch.func.grad(loss)(weights, "loop")
    torch.testing.assert_close(torch.func.grad(loss)(weights, "auto"), expected)
    with pytest.raises(MultintError, match=r"torch.func transform"):
        torch.func.grad(loss)(weights, "fused")


def test_explain_tells_the_plan_and_the_choice():
    cell = LSTMCell(128, 512)
    text = str(explain(cell, torch.empty(50, 32, 128), engine="fused"))
    assert "engine: fused" in text
    assert re.search(r"Wx\[:\] = x\[:\] @ W +\(T·B × 128\) @ \(128 × 2048\)", text)
    assert "(50, 32, 2048) float32, 12.5 MiB" in text
    assert re.search(r"Uh\[t\] = h\[t\] @ U +\(B × 512\) @ \(512 × 2048\)", text)
    assert re.search(r"d_U = h\[:\]ᵀ @ d_Uh\[:\]", text)
    assert explain(cell, torch.empty(50, 32, 128), engine="loop").engine == "loop"


@pytest.mark.usefixtures("eager")
def test_auto_compiles_what_is_worth_it_and_tells_afterwards(monkeypatch):
    monkeypatch.setattr(Program, "is_native", lambda program: True)
    rnn = Recurrent(64, 128, LSTMCell)
    with pytest.raises(OptionError, match="has not run"):
        rnn.explain()
    for steps, engine, reason in ((100, "fused", ""), (2, "loop", "multiply-adds")):
        rnn(torch.randn(steps, 16, 64))
        (told,) = rnn.explain()
        assert told.engine == engine
        assert reason in told.reason
    rnn.double()(torch.randn(100, 16, 64).double())
    assert rnn.explain()[0].engine == "fused"
    rnn.half()(torch.randn(100, 16, 64).half())
    assert "this is torch.float16 on cpu" in rnn.explain()[0].reason


@pytest.mark.usefixtures("eager")
def test_auto_takes_float64_by_native_loops_only():
    """Pieces are not measured in it."""
    cell = LSTMCell(64, 128).double()
    xs = torch.randn(100, 16, 64).double()
    scan(cell, xs, cell.initial_state(16))
    for told in (explain(cell), explain(cell, xs)):
        assert told.engine == "loop"
        assert "in float64 fused is measured by native loops only" in told.reason


@pytest.mark.usefixtures("no_inductor")
def test_many_gradients_at_once():
    cell = built("lstm-mi")
    xs, state = inputs(cell)
    leaves, found = [xs, *cell.parameters()], []
    for engine in ("fused", "loop"):
        output, _ = scan(cell, xs, state, engine)
        many = normal(3, *output.shape, seed=5)
        found.append(torch.autograd.grad(output, leaves, many, is_grads_batched=True))
    close(*found, torch.float64)
    assert explain(cell).engine == "fused"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("native", "times"), [(True, 1), (False, 10)])
def test_auto_compiles_a_small_scan_when_its_cell_has_run_often(native, times, monkeypatch):
    """What has no native loop takes longer to compile, so it waits longer."""
    monkeypatch.setattr(Program, "is_native", lambda program: native)
    monkeypatch.setattr(checks, "_STEPS_BEFORE", 8)
    cell, other = (LSTMCell(INPUT_SIZE, HIDDEN_SIZE) for _ in range(2))
    xs, state = inputs(cell, 4, 3, torch.float32)
    expected = results(cell, xs, state, "loop")
    for call in range(2 * times + 2):
        close(results(cell, xs, state, "auto"), expected, torch.float32)
        assert explain(cell).engine == ("loop" if call < 2 * times else "fused")
        assert explain(cell, xs, state).engine == ("loop" if call < 2 * times - 1 else "fused"), "of the next call"
    scan(other, xs, state)
    assert "after 8 steps" in explain(other).reason


class Reader(Cell):
    """A cell that reads a short sequence at each step, by a layer and by a scan of its own."""

    def __init__(self):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.layer = Recurrent(INPUT_SIZE, HIDDEN_SIZE, LSTMCell, bidirectional=True, zoneout=0.1, engine="loop").eval()

    def step(self, x, state):
        words = x.transpose(0, 1)  # (S, B, X)
        output, _ = self.layer(words)
        first = LSTMState(state.h, state.h.tanh())
        _, last = scan(self.layer.directions[0].cell, words, first, self.layer.engine)
        return HiddenState(output[-1, :, :HIDDEN_SIZE] * last.c + state.h.sin())

    def initial_state(self, batch_size):
        return HiddenState(self.zeros(batch_size, self.hidden_size))


@pytest.mark.usefixtures("eager")
def test_a_scan_within_a_step_is_its_loop():
    cell, xs = randomise(Reader()).double(), normal(3, 4, 2, INPUT_SIZE, requires_grad=True)
    state = HiddenState(normal(4, HIDDEN_SIZE, seed=1, requires_grad=True))
    expected = results(cell, xs, state, "loop")
    cell.layer.engine = "auto"
    close(results(cell, xs, state, "fused"), expected, torch.float64)
