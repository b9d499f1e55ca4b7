"""What adding a task costs: a task, its data, a config; and nothing in the core."""

import csv

import pytest
import torch

from experiments.__main__ import main
from experiments.core.loading import load_task
from experiments.core.trust import trusting

pytestmark = pytest.mark.runs

MODULE = '''
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from experiments.core.task import Data, Mean, Monitor, Task


class Points(Data):
    """y = 3x, in 8 batches."""

    def __init__(self, features: int = 2):
        self.features = features

    def train_dataloader(self):
        x = torch.randn(128, self.features, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, 3 * x), batch_size=16)

    val_dataloader = test_dataloader = train_dataloader


class Fitting(Task):
    """Least squares. It has its say at the end."""

    monitor = Monitor("loss", "min")

    def __init__(self, network: Callable[[int], nn.Module], optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam):
        super().__init__(optimizer)
        self._build_network = network

    def describe(self, data):
        return {"features": data.features}

    def build(self, description):
        return self._build_network(description["features"])

    def measure(self, batch, stage):
        x, y = batch
        return {"loss": Mean(nn.functional.mse_loss(self.network(x), y), len(x))}

    def show(self):
        return "three times one is " + str(round(self.network(torch.ones(2))[0].item(), 1))


class Untested(Data):
    """Data without a test."""

    features, train_dataloader, val_dataloader = 2, Points.train_dataloader, Points.train_dataloader


class Misnamed(Fitting):
    """It monitors what it does not measure."""

    monitor = Monitor("accuracy", "max")


class Lossless(Fitting):
    """It measures no loss."""

    def measure(self, batch, stage):
        return {"error": super().measure(batch, stage)["loss"]}


class Line(nn.Linear):
    def __init__(self, features: int):
        super().__init__(features, features)


class Rollouts:
    """So many of them, each played when it is asked for."""

    def __init__(self, play, count):
        self._play, self._count = play, count

    def __len__(self):
        return self._count

    def __iter__(self):
        return (self._play() for _ in range(self._count))


class Bandit(Task):
    """A policy that pulls one of two arms, the second of which pays: its batches are rollouts of its own."""

    monitor = Monitor("reward", "max")
    unit = "episodes"

    def __init__(self, episodes: int = 64, optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam):
        super().__init__(optimizer)
        self._episodes = episodes

    def describe(self, data):
        assert data is None
        return {"arms": 2}

    def build(self, description):
        return nn.Linear(1, description["arms"])

    def train_dataloader(self):
        return Rollouts(self._play, 20)

    def val_dataloader(self):
        return Rollouts(self._play, 1)

    test_dataloader = val_dataloader

    def measure(self, batch, stage):
        arms, rewards = batch
        chosen = self.network(torch.ones(1)).log_softmax(-1)[arms]
        return {
            "loss": Mean(-(chosen * (rewards - 0.5)).mean(), len(arms)),
            "reward": Mean(rewards.mean(), len(arms)),
        }

    @torch.no_grad()
    def _play(self):
        arms = torch.distributions.Categorical(logits=self.network(torch.ones(1))).sample((self._episodes,))
        return arms, arms.float()
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The module `own`, as a user would write it, in a folder where Python finds it."""
    (tmp_path / "own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*options):
    quiet = ("--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1")
    return main(["fit", *options, *quiet, "--trust", "own"])


def rows(folder):
    with (folder / "runs" / "run" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# Lightning advises more workers for data that are in memory.
few_workers = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


@few_workers
def test_a_task_of_ones_own_is_trained_tested_and_shown(module, capsys):
    config = module / "points.yaml"
    config.write_text(
        """
        model:
          class_path: Fitting
          init_args: {network: own.Line, optimizer: {class_path: Adam, init_args: {lr: 0.1}}}
        data: Points
        trainer: {max_epochs: 30}
        """
    )
    assert fit("--config", str(config)) == 0
    out = capsys.readouterr().out
    assert "three times one is 3.0" in out
    assert "test loss" in out
    assert float(rows(module)[-1]["test/loss"]) < 1e-2
    with trusting(["own"]):
        task = load_task(module / "runs/run/version_0/checkpoints/best.ckpt")
    assert task.network(torch.ones(2)).tolist() == pytest.approx([3, 3], abs=0.2)


@few_workers
def test_a_policy_without_data_learns_from_its_rollouts(module, capsys):
    config = module / "bandit.yaml"
    config.write_text("model: {class_path: Bandit, init_args: {optimizer: {class_path: Adam, init_args: {lr: 0.2}}}}")
    assert fit("--config", str(config), "--trainer.max_epochs=3") == 0
    assert "validation reward" in capsys.readouterr().out
    rewards = [float(row["val/reward"]) for row in rows(module) if row["val/reward"]]
    assert rewards[-1] > 0.9
    best = torch.load(module / "runs/run/version_0/checkpoints/best.ckpt", weights_only=True)
    assert best["callbacks"]["Checkpoints"]["best_score"] == pytest.approx(max(rewards))


@few_workers
def test_a_checkpoint_of_another_task_or_of_other_data_is_refused(module, capsys):
    options = ("--model=Fitting", "--model.network=own.Line", "--data=Points", "--trainer.max_epochs=1")
    assert fit(*options) == 0
    last = "runs/run/version_0/checkpoints/last.ckpt"
    assert fit("--model=Bandit", "--trainer.max_epochs=1", "--ckpt_path", last) == 2
    assert "the checkpoint is of the task Fitting" in capsys.readouterr().err
    assert fit(*options, "--data.features=3", "--ckpt_path", last) == 2
    assert "differ in the features" in capsys.readouterr().err
    assert main(["sample", last, "--trust", "own"]) == 2
    assert "writes no text" in capsys.readouterr().err


FITTING = ("--model.network=own.Line", "--trainer.max_epochs=1")


@few_workers
def test_a_task_without_a_test_is_reported_without_one(module, capsys):
    assert fit("--model=Fitting", "--data=Untested", *FITTING) == 0
    out = capsys.readouterr().out
    assert "validation loss" in out
    assert "test loss" not in out


@few_workers
@pytest.mark.parametrize(
    ("task", "part"),
    [("Misnamed", "its monitor is val/accuracy, not one of val/loss"), ("Lossless", "expected a loss")],
)
def test_a_task_that_contradicts_itself_is_one_message(task, part, module, capsys):
    assert fit(f"--model={task}", "--data=Points", *FITTING, "--trainer.num_sanity_val_steps=0") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert part in shown


@few_workers
def test_weights_are_exported_of_a_task_that_knows_no_call(module, capsys):
    assert fit("--model=Fitting", "--data=Points", *FITTING) == 0
    export = ("export", "runs/run/version_0/checkpoints/best.ckpt", "--trust", "own")
    assert main([*export, "--format", "safetensors", "--output", "line.safetensors"]) == 0
    assert main([*export, "--format", "onnx"]) == 2
    assert "does not say how its network is called" in capsys.readouterr().err
