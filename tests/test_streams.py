"""Streams that restart, initial states that are learnt, penalties, and the worst stream of an evaluation."""

import math
from functools import partial

import pytest
import torch
from lightning import Trainer, seed_everything
from torch.testing import assert_close

from experiments.core.errors import ExperimentError
from experiments.core.module import DataModule, TaskModule
from experiments.data import TextData
from experiments.data.text import Batch
from experiments.tasks import LanguageModelling
from models import LanguageModel
from multint import GRU, LSTM, RNN, Cell, LSTMCell, Recurrent
from multint.cells import HiddenState

pytestmark = pytest.mark.compiles

V, H, T, B = 7, 5, 6, 4


def task(cell=LSTMCell, learnt_state=False, **settings):
    seed_everything(0, verbose=False)

    def network(symbols):
        return LanguageModel(symbols, lambda x: Recurrent(x, H, cell, learnt_state=learnt_state), 3)

    built = LanguageModelling(network, partial(torch.optim.Adam, lr=0.01), **settings)
    built.network = network(V)
    return built


def windows(count=2):
    """Windows of a text that goes on, the first one at its start."""
    ids = torch.randint(V, (count * T + 1, B), generator=torch.Generator().manual_seed(0))
    return [Batch(ids[i * T : (i + 1) * T], ids[i * T + 1 : (i + 1) * T + 1], i == 0) for i in range(count)]


def losses(of_task, stage="train"):
    return torch.stack([of_task.measure(batch, stage)["loss"].value for batch in windows()])


@pytest.mark.parametrize("learnt_state", [False, True])
def test_a_stream_that_restarts_starts_from_the_initial_state(learnt_state):
    built = task(learnt_state=learnt_state, restart=1.0)
    for start in built.network.recurrent.directions[0].start.values():
        torch.nn.init.normal_(start)
    anew = torch.stack(
        [
            torch.nn.functional.cross_entropy(built.network(batch.inputs)[0].flatten(0, 1), batch.targets.flatten())
            for batch in windows()
        ]
    )
    assert_close(losses(built), anew)
    built.restart = 0.0
    carried = losses(built)
    assert_close(carried[0], anew[0])
    assert (carried[1] - anew[1]).abs() > 1e-4


def test_some_streams_restart_and_the_others_go_on():
    built = task(restart=0.5)
    state = built.network(windows()[0].inputs)[1]
    chosen = torch.tensor([True, False, False, True])
    for old, new in zip(state, built.network.restarted(state, chosen), strict=True):
        assert_close(new[:, chosen], torch.zeros_like(old[:, chosen]))
        assert_close(new[:, ~chosen], old[:, ~chosen])


def test_evaluation_restarts_no_stream():
    first, second = task(restart=0.0), task(restart=1.0)
    assert_close(losses(first, "val"), losses(second, "val"))


@pytest.mark.parametrize("settings", [{"restart": 1.5}, {"activation_penalty": -1.0}, {"change_penalty": math.nan}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ExperimentError, match=next(iter(settings))):
        task(**settings)


def test_penalties_are_those_of_their_equations():
    built = task(activation_penalty=2.0, change_penalty=3.0)
    [batch] = windows(1)
    measured = built.measure(batch, "train")
    h = built.network.features(batch.inputs).undropped
    expected = 2 * (h**2).mean() + 3 * ((h[1:] - h[:-1]) ** 2).mean()
    assert_close(measured["penalty"].value, expected)
    assert "penalty" not in built.measure(batch, "val")
    assert "penalty" not in task().measure(batch, "train")


class Trap(Cell):
    """It stays in its initial state while x > 0, and is right from any other, as training with carried states is."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.start = torch.nn.Parameter(torch.zeros(()))

    def step(self, x, state):
        lost = (state.h.sum(-1, keepdim=True) == 0) & (x[:, :1] > 0)
        return HiddenState(torch.where(lost, torch.zeros_like(state.h), torch.ones_like(state.h) + 0 * self.start))

    def initial_state(self, batch_size):
        return HiddenState(torch.zeros(batch_size, self.hidden_size))


def test_an_evaluation_warns_of_streams_that_fell_into_a_trap(tmp_path):
    """Half of the streams begin with a symbol that keeps them in the trap, where the softmax is worse than guessing."""
    path = tmp_path / "text.txt"
    # The streams of the validation text: two begin with an a, and two are of b alone.
    path.write_text("ab" * 200 + "abbbbbbbbbbbbbbbbbbb" * 2 + "b" + "ab" * 20 + "a")
    text = TextData(path=str(path), valid=41 / 482, test=41 / 482, batch_size=4, length=10, eval_batch_size=4)

    def network(symbols):
        net = LanguageModel(symbols, lambda x: Recurrent(x, H, Trap, engine="loop"), 1)
        with torch.no_grad():
            net.embedding.weight.copy_(torch.tensor([[-1.0], [1.0]]))  # b keeps a stream in the trap
            net.decoder.weight.copy_(torch.tensor([[-2.0], [2.0]]).expand(2, H))
            net.decoder.bias.copy_(torch.tensor([5.0, -5.0]))  # in the trap it is sure of an a
        return net

    evaluated = LanguageModelling(network)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    with pytest.warns(UserWarning, match="2 of 4 streams take more bits than guessing"):
        [scores] = Trainer(**quiet).validate(TaskModule(evaluated), DataModule(text), verbose=False)
    assert scores["val/worst_bpc"] > 10
    assert scores["val/bpc"] == pytest.approx(scores["val/worst_bpc"] / 2, rel=0.1)


@pytest.mark.parametrize(("kind", "engine"), [(RNN, "loop"), (LSTM, "loop"), (LSTM, "fused"), (GRU, "loop")])
def test_a_learnt_initial_state_is_where_every_direction_starts(kind, engine):
    torch.manual_seed(0)
    rnn = kind(3, H, num_layers=2, bidirectional=True, learnt_state=True, engine=engine).double()
    for direction in rnn.directions:
        for start in direction.start.values():
            torch.nn.init.normal_(start)
    x = torch.randn(T, B, 3, dtype=torch.float64)
    fields = rnn.directions[0].cell.initial_state(1)._fields
    given = [torch.stack([direction.start[name].expand(B, -1) for direction in rnn.directions]) for name in fields]
    output, _ = rnn(x)
    assert_close(output, rnn(x, tuple(given) if len(given) > 1 else given[0])[0])
    output.sum().backward()
    for direction in rnn.directions:
        for start in direction.start.values():
            assert start.grad.abs().min() > 0


def test_an_episode_restarts_from_the_learnt_state():
    torch.manual_seed(0)
    rnn = LSTM(3, H, learnt_state=True).double()
    for start in rnn.directions[0].start.values():
        torch.nn.init.normal_(start)
    x = torch.randn(T, B, 3, dtype=torch.float64)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    assert_close(rnn(x, reset=reset)[0][3:], rnn(x[3:])[0])
