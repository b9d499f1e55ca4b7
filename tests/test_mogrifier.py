"""The Mogrifier against its equations in NumPy, and from a config."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from experiments.core.configs import CONFIGS
from multint import Additive, GRUCell, LSTMCell, Mogrifier, MultintError, Recurrent, RNNCell, explain, scan
from multint.cells import LSTMState
from tests.both_engines import inputs, results
from tests.catalogue import normal, randomise
from tests.test_configs import built

T, B, X, H = 6, 3, 5, 7
lstm = partial(LSTMCell, integrator=Additive)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def by_hand(cell, xs, h, c):
    """Melis et al. 2020, eqs. 1 and 2, and the LSTM that follows them, step by step."""
    weights = {name: weight.detach().numpy() for name, weight in cell.named_parameters()}
    matrices = []
    for i in range(len(cell.rounds)):
        Q = weights[f"rounds.{i}.z_projection.weight"]
        matrices.append(Q @ weights[f"rounds.{i}.z_factor.weight"] if cell.rounds[i].rank else Q)
    W, U = (weights[f"cell.gates.{stream}_projection.weight"] for stream in "xz")
    output = []
    for x in xs:
        for i, matrix in enumerate(matrices, 1):
            if i % 2:
                x = 2 * sigmoid(h @ matrix.T) * x
            else:
                h = 2 * sigmoid(x @ matrix.T) * h
        i, f, g, o = np.split(x @ W.T + h @ U.T + weights["cell.gates.bias"], 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        output.append(h)
    return np.stack(output), h, c


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_it_is_the_papers_equations(rounds, rank):
    cell = randomise(Mogrifier(X, H, lstm, rounds, rank).double())
    xs, h, c = normal(T, B, X), normal(B, H, seed=2), normal(B, H, seed=3)
    output, final = scan(cell, xs, LSTMState(h, c))
    expected = by_hand(cell, xs.numpy(), h.numpy(), c.numpy())
    for actual, theirs in zip((output, *final), expected, strict=True):
        assert_close(actual, torch.from_numpy(theirs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [RNNCell, GRUCell, partial(LSTMCell, proj_size=3)])
def test_with_closed_gates_it_is_the_cell(kind):
    """2σ(0) = 1, whatever the cell and the width of its output."""
    cell = randomise(Mogrifier(X, H, kind, rounds=4).double())
    for scale in cell.rounds:
        scale.z_projection.weight.data.zero_()
    xs, state = inputs(cell)
    for actual, expected in zip(*(scan(one, xs, state) for one in (cell, cell.cell)), strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("eager", "poisoned")
@pytest.mark.compiles
def test_five_rounds_run_compiled():
    """Every round is a product in the step, and none is left to the loop."""
    cell = randomise(Mogrifier(X, H, lstm, rank=2).double())
    xs, state = inputs(cell)
    assert_close(*(results(cell, xs, state, engine) for engine in ("fused", "loop")), rtol=1e-10, atol=1e-10)
    explained = explain(cell)
    assert explained.engine == "fused"
    forward = explained.plan.partition("each step t:")[2].partition("each step t backward:")[0]
    assert forward.count(" @ ") >= 2 * 5 + 1  # two matrices for each round; those on one stream may be one product


def test_a_layer_regularises_it():
    """Its gates are integrators of the cell: masks of the state and dropped weights reach them."""
    rnn = Recurrent(X, H, Mogrifier, num_layers=2, zoneout={"c": 0.2}, state_dropout=0.3, weight_drop=0.3).double()
    [dropped, _] = (set(direction.dropped_weights) for direction in rnn.directions)
    assert {f"cell.rounds.{i}.z_projection.weight" for i in range(5)} < dropped
    output, final = rnn(normal(T, B, X), lengths=[6, 2, 4])
    assert output.isfinite().all()
    assert final._fields == ("h", "c")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mogrifier(X, H, rounds=-1), "Mogrifier: rounds is -1, expected a whole number of at least 0"),
        (lambda: Mogrifier(X, H, rank=0), "rank is 0"),
        (lambda: Mogrifier(X, H, LSTMCell(X, H)), "Mogrifier: cell is a LSTMCell, expected a factory"),
        (lambda: Mogrifier(X, H, torch.nn.LSTMCell), "Mogrifier: cell gives a LSTMCell, expected a multint.Cell"),
    ],
)
def test_wrong_settings_say_what_was_expected(make, message):
    with pytest.raises(MultintError, match=message):
        make()


IN_YAML = {
    "Mogrifier": (LSTMCell, 5, None),
    "{class_path: Mogrifier, init_args: {cell: GRUCell, rounds: 4, rank: 8}}": (GRUCell, 4, 8),
    """
          class_path: Mogrifier
          init_args:
            cell: {class_path: LSTMCell, init_args: {integrator: Additive, forget_bias: 1.0}}
    """: (lstm, 5, None),
}


@pytest.mark.runs
@pytest.mark.parametrize("written", IN_YAML)
def test_a_config_names_it(written, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"model:\n  network:\n    recurrent:\n      cell: {written}")
    commands = built(CONFIGS / "characters/quickstart.yaml", "--config", str(path))
    with torch.device("meta"):
        cell = commands.task._build_network(97).recurrent.directions[0].cell
    kind, rounds, rank = IN_YAML[written]
    expected = Mogrifier(64, 256, kind, rounds, rank)
    assert type(cell) is Mogrifier
    shapes = [{name: weight.shape for name, weight in one.state_dict().items()} for one in (cell, expected)]
    assert shapes[0] == shapes[1]
