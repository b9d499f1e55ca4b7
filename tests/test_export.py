"""Programs of torch.export and torch.compile: integrators and layers go in whole, and give what they give eagerly."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_sequence

from multint import GRU, LSTM, RNN, Bilinear, Cell, MultiplicativeIntegration, Recurrent
from multint.cells import HiddenState
from multint.errors import EngineError, OptionError
from tests.catalogue import INPUT_SIZE, INTEGRATORS, Sizes, initial_state, layer, normal, randomise

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parent.parent
FREE = Dim.DYNAMIC
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Holder(nn.Module):
    """A user's module around an integrator."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.meet = randomise(INTEGRATORS[name](Sizes(7, 5, 3)).double())

    def forward(self, x, z):
        return self.meet(x, z).tanh()


@pytest.fixture
def anew():
    """All integrators share one `forward`, and recompilations of one function are limited."""
    torch.compiler.reset()


def gradients(outputs, leaves):
    loss = sum((output * normal(*output.shape, seed=9).to(output)).sum() for output in outputs)
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def compiles_whole(module, *inputs, backend="aot_eager", **others):
    """Outputs and gradients of all floating inputs and parameters are the eager ones, without a graph break."""
    whole = torch.compile(module, backend=backend, fullgraph=True)
    leaves = [value for value in (*inputs, *module.parameters()) if value.requires_grad]
    made = []
    for run in (whole, module):
        result = run(*inputs, **others)
        outputs = [result] if isinstance(result, torch.Tensor) else [result[0], *result[1]]
        made.append((outputs, gradients(outputs, leaves)))
    torch.testing.assert_close(*made, **EXACT)


@pytest.mark.parametrize("name", INTEGRATORS)
def test_integrators_are_exported_with_a_free_batch(name):
    holder = Holder(name)
    program = torch.export.export(holder, (normal(4, 7), normal(4, 5)), dynamic_shapes=({0: FREE}, {0: FREE})).module()
    for rows in (1, 4, 9):
        x, z = normal(rows, 7), normal(rows, 5, seed=2)
        torch.testing.assert_close(program(x, z), holder(x, z), **EXACT)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("name", INTEGRATORS)
def test_a_module_that_holds_an_integrator_is_compiled_whole(name):
    compiles_whole(
        Holder(name), normal(4, 7, requires_grad=True), normal(4, 5, seed=2, requires_grad=True), backend="eager"
    )


@pytest.mark.usefixtures("anew")
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_an_integrator():
    inputs = normal(4, 7, requires_grad=True), normal(4, 5, seed=2, requires_grad=True)
    compiles_whole(Holder("mi"), *inputs, backend="inductor")


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
def test_a_layer_is_compiled_whole_by_the_loop(kind):
    size = {"num_layers": 1 + (kind is GRU), "bidirectional": kind is LSTM}
    rnn = randomise(kind(INPUT_SIZE, 7, engine="loop", **size).double())
    compiles_whole(rnn, normal(2, 3, INPUT_SIZE, requires_grad=True), lengths=torch.tensor([2, 1, 2]))


def test_a_layer_in_training_is_compiled_whole():
    noise = {"zoneout": 0.2, "input_dropout": 0.2, "state_dropout": 0.2, "weight_drop": 0.2, "weight_noise": 0.2}
    rnn = LSTM(INPUT_SIZE, 7, engine="loop", **noise)
    output, _ = torch.compile(rnn, backend="eager", fullgraph=True)(torch.randn(3, 2, INPUT_SIZE))
    assert output.isfinite().all()


@pytest.mark.parametrize("engine", ["auto", "fused"])
def test_a_layer_is_exported_with_a_fixed_length(engine):
    rnn = layer("lstm-mi", "bidirectional", engine=engine)
    program = torch.export.export(rnn, (normal(3, 2, INPUT_SIZE),), dynamic_shapes=({1: FREE},)).module()
    for rows in (1, 2, 5):
        xs = normal(3, rows, INPUT_SIZE)
        torch.testing.assert_close(program(xs), rnn(xs), **EXACT)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("rnn-hypernetwork", "plain"),
        ("lstm-norm", "plain"),
        ("lstm-projected", "stacked"),
        ("gru-after", "plain"),
        ("own-leaky", "plain"),
        ("rnn-tucker", "zoneout"),
    ],
)
def test_a_layer_is_exported_with_a_free_length_and_state(name, mode):
    rnn = layer(name, mode).requires_grad_(False)  # torch's operator takes seconds to find its derivative

    def call(steps, rows):
        return normal(steps, rows, INPUT_SIZE), initial_state(rnn, rows)

    xs, state = given = call(4, 3)
    free = {1: FREE} if isinstance(state, torch.Tensor) else type(state)(*({1: FREE} for _ in state))
    given = xs, state
    program = torch.export.export(rnn, given, dynamic_shapes=({0: FREE, 1: FREE}, free)).module()
    for steps, rows in ((1, 1), (6, 2), (5, 5)):
        given = call(steps, rows)
        torch.testing.assert_close(program(*given), rnn(*given), **EXACT)


@pytest.mark.parametrize("free_length", [False, True])
def test_a_layer_is_exported_with_lengths_and_resets(free_length):
    rnn = randomise(GRU(INPUT_SIZE, 7, bidirectional=True, batch_first=True, state_dropout=0.1).double())
    rnn.eval().requires_grad_(False)

    def call(steps, rows):
        lengths = normal(rows).abs().mul(3).long().clamp(1, steps)
        return normal(rows, steps, INPUT_SIZE), {"lengths": lengths, "reset": normal(rows, steps) > 0.7}

    xs, others = call(4, 3)
    axes = {0: FREE, 1: FREE} if free_length else {0: FREE}
    free = {"input": axes, "lengths": {0: FREE}, "reset": axes}
    program = torch.export.export(rnn, (xs,), others, dynamic_shapes=free).module()
    for steps, rows in ((1, 1), (6, 2)) if free_length else ((4, 1), (4, 5)):
        xs, others = call(steps, rows)
        torch.testing.assert_close(program(xs, **others), rnn(xs, **others), **EXACT)


def test_the_first_thing_that_a_process_does_may_be_an_export():
    """einops and torch keep notes of what they have met, and none can be taken inside torch's operator."""
    code = (
        "import torch; from multint import RNN, Bilinear; D = torch.export.Dim.DYNAMIC\n"
        "rnn = RNN(5, 7, integrator=Bilinear).eval().requires_grad_(False)\n"
        "program = torch.export.export(rnn, (torch.randn(4, 3, 5),), dynamic_shapes=({0: D, 1: D},)).module()\n"
        "xs = torch.randn(9, 2, 5)\n"
        "torch.testing.assert_close(program(xs), rnn(xs))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


class Branching(Cell):
    """A cell whose step depends on values."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.meet = MultiplicativeIntegration(input_size, hidden_size, hidden_size)

    def step(self, x, state):
        h = self.meet(x, state.h)
        return HiddenState(h.tanh() if h.sum() > 0 else h)

    def initial_state(self, batch_size):
        return HiddenState(self.zeros(batch_size, self.hidden_size))


def test_what_cannot_be_exported_says_so():
    xs = torch.randn(4, 3, INPUT_SIZE)
    with pytest.raises(EngineError, match="cannot be exported with a free length"):
        torch.export.export(Recurrent(INPUT_SIZE, 7, Branching).eval(), (xs,), dynamic_shapes=({0: FREE, 1: FREE},))
    with pytest.raises(OptionError, match="PackedSequence, which cannot be exported"):
        torch.export.export(RNN(INPUT_SIZE, 7, integrator=Bilinear), (pack_sequence([xs[:, 0]]),))
