"""Training on made data: every task overfits a batch, its metrics are right, and a run goes on where it stopped."""

import math
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, ReduceLROnPlateau
from torch.testing import assert_close

from experiments.core import population_statistics
from experiments.core.callbacks import RandomState
from experiments.core.errors import ExperimentError
from experiments.core.module import DataModule, TaskModule
from experiments.core.optimisation import InTurn, LearningRate
from experiments.core.population_statistics import PopulationStatistics
from experiments.core.run_folder import RunFolder
from experiments.core.saving import Checkpoints
from experiments.data import (
    Adding,
    AffineTasks,
    CopyMemory,
    RegularLanguage,
    SequentialDigits,
    StateMachine,
    TextData,
)
from experiments.tasks import Memory, Regression, StateTracking
from models import SequenceLabeller, SequenceReader
from multint import Additive, Bilinear, Conditional, GRUCell, Integrator, LSTMCell, Recurrent, RNNCell
from multint.integrators import Normalised, RecurrentBatchNorm

pytestmark = pytest.mark.runs

Adam = partial(torch.optim.Adam, lr=0.02)
pure = partial(Bilinear, z_term=False, x_term=False, bias=None)


def cell(input_size, hidden_size):
    return RNNCell(input_size, hidden_size, pure, activation=torch.nn.functional.normalize, start=1.0)


def labeller(symbols, states):
    return SequenceLabeller(symbols, states, partial(Recurrent, hidden_size=8, cell=cell))


def regression():
    return Regression(partial(Conditional, hidden=16, layers=2), optimizer=Adam)


def tracking():
    return StateTracking(labeller, optimizer=Adam)


def memory():
    return Memory(partial(SequenceReader, recurrent=partial(Recurrent, hidden_size=16, cell=GRUCell)), optimizer=Adam)


def normalised():
    norm = partial(RecurrentBatchNorm, max_steps=4)
    cell = partial(LSTMCell, integrator=Normalised.of(Additive, norm=norm), memory_norm=partial(norm, bias=True))
    return Memory(partial(SequenceReader, recurrent=partial(Recurrent, hidden_size=8, cell=cell)), optimizer=Adam)


def digits(batch_size, epoch, eval_examples):
    """Its evaluations are as large as they are."""
    pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed (extra dev)")
    return SequentialDigits("rows", batch_size, epoch)


SMALL = {"batch_size": 8, "epoch": 3, "eval_examples": 12}
PROTOCOLS = [
    (regression, partial(AffineTasks, 2, 2, 2, **SMALL)),
    (tracking, partial(StateMachine, "addition", 2, length=4, test_length=10, **SMALL)),
    (memory, partial(Adding, 6, **SMALL)),
    (memory, partial(CopyMemory, 3, 2, delay=2, **SMALL)),
    (memory, partial(RegularLanguage, "even_pairs", 3, 6, 9, **SMALL)),
    (memory, partial(digits, **SMALL)),
    (normalised, partial(Adding, 6, **SMALL)),
]
NAMES = ["regression", "state_tracking", "adding", "copy", "regular_language", "digits", "batch normalisation"]
every_task = pytest.mark.parametrize(("task", "data"), PROTOCOLS, ids=NAMES)


def evaluated(task, data):
    trainer = Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    [scores] = trainer.test(TaskModule(task), DataModule(data), verbose=False)
    return scores


@every_task
def test_a_task_overfits_a_batch(task, data):
    seed_everything(1, verbose=False)
    task, data = task(), data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    task.use(task.describe(data), "the data")
    optimizer = task.optimizer()
    first = task.measure(batch, "train")["loss"].value.item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = task.measure(batch, "train")["loss"].value
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def run(folder, task, data, until, checkpoint=None, callbacks=()):
    seed_everything(1, verbose=False)
    run_folder = RunFolder(folder, "run", checkpoint)
    run_folder.make()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    of_run = [*callbacks, RandomState(), Checkpoints(run_folder)]
    trainer = Trainer(callbacks=of_run, max_steps=until, max_epochs=-1, **quiet)
    trainer.fit(TaskModule(task()), DataModule(data()), ckpt_path=checkpoint, weights_only=True)
    return run_folder.last


@every_task
def test_a_resumed_run_equals_an_uninterrupted_one(task, data, tmp_path):
    """Stopped after the fifth of eight steps: in the middle of an epoch."""
    whole = run(tmp_path / "whole", task, data, 8)
    stopped = run(tmp_path / "stopped", task, data, 5)
    resumed = run(tmp_path / "stopped", task, data, 8, stopped)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (whole, resumed)]
    assert_close(states[0], states[1], rtol=0, atol=0)


def learnt(path):
    """The parameters, and the statistics of batch normalisation."""
    state = torch.load(path, weights_only=True)["state_dict"]
    names = [name for name in state if name.rpartition(".")[2] in ("mean", "variance", "count")]
    return {name: value for name, value in state.items() if name not in names}, {name: state[name] for name in names}


def test_population_statistics_are_the_validations_and_change_no_training(tmp_path):
    data = partial(Adding, 6, **SMALL)
    runs = {"without": None, "whole": 2, "stopped": 2}
    kept = {
        name: run(tmp_path / name, normalised, data, 5 if name == "stopped" else 6, None, statistics(batches))
        for name, batches in runs.items()
    }
    parameters, estimated = learnt(kept["whole"])
    assert_close(learnt(kept["without"])[0], parameters, rtol=0, atol=0)
    resumed = run(tmp_path / "stopped", normalised, data, 6, kept["stopped"], statistics(2))
    assert_close(learnt(resumed), (parameters, estimated), rtol=0, atol=0)
    # The run ended with a validation: its statistics are of two batches of 8, and not of all that training has seen.
    counts = [value for name, value in estimated.items() if name.endswith("count")]
    assert_close(torch.stack(counts), torch.tensor([16.0, 16.0, 16.0, 48.0]).expand(3, -1))


def statistics(batches):
    return [] if batches is None else [PopulationStatistics(batches)]


def test_population_statistics_of_several_processes_are_of_all_their_rows(monkeypatch):
    norm, other = RecurrentBatchNorm(2, max_steps=4), RecurrentBatchNorm(2, max_steps=4)
    rows = torch.randn(7, 2).double()
    norm.double(), other.double()
    for one, part in ((norm, rows[:3]), (other, rows[3:])):
        one.count[0], one.mean[0], one.variance[0] = len(part), part.mean(0), part.var(0, correction=0)
    theirs = [other.count, other.count.div(7).unsqueeze(1) * other.mean]
    theirs += [other.count.div(7).unsqueeze(1) * (other.variance + (other.mean - rows.mean(0)).square())]
    monkeypatch.setattr(population_statistics, "summed", lambda value: value + theirs.pop(0))
    population_statistics._pool(norm)
    assert_close((norm.count[0].item(), norm.mean[0], norm.variance[0]), (7.0, rows.mean(0), rows.var(0, correction=0)))
    assert_close((norm.mean[1:], norm.variance[1:]), (torch.zeros(3, 2).double(), torch.ones(3, 2).double()))


def test_population_statistics_need_something_to_estimate(tmp_path):
    with pytest.raises(ExperimentError, match="batches is 0"):
        PopulationStatistics(0)
    with pytest.raises(ExperimentError, match="SequenceReader has no RecurrentBatchNorm"):
        run(tmp_path, memory, partial(Adding, 6, **SMALL), 3, None, statistics(1))


def cosine(step, steps):
    return (1 + math.cos(math.pi * step / steps)) / 2


# Schedules of torch, with the rates that they mean over 8 steps, of 0.02.
WARM_UP = partial(LinearLR, start_factor=0.25, total_iters=-1)
TO_THE_END = partial(CosineAnnealingLR, T_max=-1)
SCHEDULES = [
    (TO_THE_END, [cosine(step, 8) for step in range(8)]),
    (partial(ExponentialLR, gamma=0.5), [0.5**step for step in range(8)]),
    (
        partial(InTurn, schedules=[WARM_UP, TO_THE_END], milestones=[3]),
        [0.25, 0.5, 0.75, *(cosine(step, 5) for step in range(5))],
    ),
]


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES, ids=["cosine", "exponential", "warm-up and cosine"])
def test_the_rate_follows_a_schedule_of_torch_and_is_resumed(schedule, expected, tmp_path):
    data = partial(AffineTasks, 2, 2, 2, **SMALL)
    rates = Rates()
    last = run(tmp_path, regression, data, 8, None, [LearningRate(schedule), rates])
    assert_close(torch.tensor(rates.seen), 0.02 * torch.tensor(expected))
    resumed = Rates()
    run(tmp_path, regression, data, 12, last, [LearningRate(schedule), resumed])
    longer = Rates()
    run(tmp_path / "longer", regression, data, 12, None, [LearningRate(schedule), longer])
    assert_close(torch.tensor(resumed.seen), torch.tensor(longer.seen[8:]))


def test_a_schedule_that_a_run_cannot_follow_is_refused(tmp_path):
    data = partial(AffineTasks, 2, 2, 2, **SMALL)
    for schedule, part in (
        (partial(CosineAnnealingLR, T_max=-1), "T_max is -1 and the run has no end"),
        (partial(ReduceLROnPlateau, mode="max"), "the mode is max, expected min"),
        (partial(ExponentialLR, gama=1), "the schedule cannot be built"),
    ):
        callbacks = [LearningRate(schedule)]
        with pytest.raises(ExperimentError, match=part):
            run(tmp_path, regression, data, -1, None, callbacks)
    with pytest.raises(ExperimentError, match="two schedules"):
        run(tmp_path, lambda: Regression(Bilinear, halve_after=1), data, 2, None, [LearningRate(TO_THE_END)])


class Zero(Integrator):
    """y = 0."""

    def integrate(self, x, z):
        return x.new_zeros(len(x), self.out_features)


def test_predicting_nothing_has_an_error_of_one():
    task = Regression(Zero)
    scores = evaluated(task, AffineTasks(4, 3, 2, batch_size=5, eval_examples=12, seed=1))
    assert scores["test/nmse"] == pytest.approx(1.0, rel=1e-5)


class Guess(torch.nn.Module):
    """Gives the same outputs for every sequence."""

    def __init__(self, outputs):
        super().__init__()
        self.register_buffer("outputs", torch.tensor(outputs))

    def forward(self, xs, last):
        return self.outputs.expand(last, xs.shape[1], -1)


def test_who_remembers_nothing_has_the_known_losses():
    """1/6 for the sum of two numbers, log K and 1/K for K symbols."""
    sizes = {"batch_size": 300, "eval_examples": 5000, "seed": 1}
    scores = evaluated(Memory(lambda inputs, outputs: Guess([1.0])), Adding(8, **sizes))
    assert scores == {"test/loss": pytest.approx(1 / 6, rel=0.05)}
    scores = evaluated(Memory(lambda inputs, outputs: Guess([0.0] * 4)), CopyMemory(4, 3, 2, **sizes))
    assert scores["test/loss"] == pytest.approx(math.log(4), rel=1e-5)
    assert scores["test/accuracy"] == pytest.approx(1 / 4, rel=0.05)
    assert len(scores) == 2


class RightUntil(torch.nn.Module):
    """Knows the sums modulo 2 until that step, and tells the opposite from there on."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, symbols):
        states = symbols.cumsum(0) % 2
        states[self.steps :] = 1 - states[self.steps :]
        return torch.nn.functional.one_hot(states, 2).float()


def test_accuracy_is_told_by_length():
    data = StateMachine("addition", 2, length=4, test_length=20, batch_size=5, eval_examples=12, seed=1)
    scores = evaluated(StateTracking(lambda symbols, states: RightUntil(6)), data)
    by_length = {name: value for name, value in scores.items() if "accuracy" in name}
    # Steps 1–4, 5–8, 9–16, and the 4 that are left.
    expected = {"accuracy_4": 1, "accuracy_8": 0.5, "accuracy_16": 0, "accuracy_20": 0, "accuracy": 6 / 20}
    assert by_length == {f"test/{name}": pytest.approx(value) for name, value in expected.items()}
    assert scores["test/above_chance"] == pytest.approx(-1), "none of the last steps is right, and half of guesses were"


@every_task
def test_data_of_another_kind_are_refused(task, data):
    with pytest.raises(ExperimentError, match="the data are TextData, expected"):
        task().describe(TextData())
