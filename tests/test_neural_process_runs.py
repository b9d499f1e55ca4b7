"""Training neural processes: tasks that are always the same or always new, and runs that go on where they stopped."""

import os
import signal
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer, seed_everything

from experiments.core.checkpoints import Checkpoints
from experiments.core.randomness import RandomState
from experiments.core.run_folder import RunFolder
from experiments.core.schedule import CosineLearningRate
from experiments.data import Curves
from experiments.tasks import NeuralProcesses
from models import LatentEncoder, NeuralProcess, PooledEncoder

pytestmark = pytest.mark.usefixtures("interruptible")


@pytest.fixture
def interruptible():
    """Lightning ignores Ctrl-C once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def task():
    seed_everything(1, verbose=False)
    encoder = partial(PooledEncoder, hidden=8, layers=2, post_layers=0)
    latent = partial(LatentEncoder, features=4, hidden=8, layers=2, post_layers=1)
    network = partial(NeuralProcess, encoder=encoder, latent=latent)
    return NeuralProcesses(network, partial(torch.optim.Adam, lr=0.01), samples=2, bound="importance", eval_samples=3)


def data():
    return Curves(batch_size=4, epoch=5, valid_tasks=8, test_tasks=8, eval_batch_size=4)


def trainer(folder, *callbacks, ckpt_path=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run_folder = RunFolder(folder, "run", ckpt_path)
    run_folder.make()
    of_run = [*callbacks, CosineLearningRate(), RandomState(), Checkpoints(run_folder)]
    return Trainer(callbacks=of_run, accelerator="cpu", **quiet, **settings)


def last(folder):
    return folder / "run" / "version_0" / "checkpoints" / "last.ckpt"


class Record(Callback):
    """What a run did: the loss, the rate and the tasks of each step, and each validation."""

    def __init__(self):
        self.steps, self.validations = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append((outputs["loss"].item(), rate, batch.target_y.sum().item()))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validations.append(trainer.callback_metrics["val/log_likelihood"].item())


class Interrupt(Callback):
    """Presses Ctrl-C in one step, or in the validation after it."""

    def __init__(self, step, in_validation):
        self.step, self.in_validation = step, in_validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.in_validation and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.in_validation and trainer.global_step == self.step and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGINT)


def run(folder, *callbacks, ckpt_path=None, **settings):
    record = Record()
    of_run = trainer(folder, record, *callbacks, ckpt_path=ckpt_path, max_steps=14, **settings)
    of_run.fit(task(), data(), ckpt_path=ckpt_path, weights_only=True)
    return record


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The records of two whole runs, by the interval of their validations in steps or epochs."""
    records = {every: run(tmp_path_factory.mktemp("whole"), val_check_interval=every) for every in (2, 1.0)}
    for record in records.values():
        assert len(record.steps) == 14
        assert len({tasks for _, _, tasks in record.steps}) == 14, "tasks came twice"
    return records


# An epoch has 5 steps. Ctrl-C comes within it, in a validation, in its last step, in the next one's first, and in the
# validation at its end.
@pytest.mark.parametrize(
    ("every", "step", "in_validation"),
    [(2, 2, False), (2, 4, True), (2, 4, False), (2, 5, False), (2, 12, True), (1.0, 4, False), (1.0, 5, True)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(every, step, in_validation, uninterrupted, tmp_path):
    first, whole = Record(), uninterrupted[every]
    with pytest.raises(SystemExit):
        run(tmp_path, first, Interrupt(step, in_validation), val_check_interval=every)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    second = run(tmp_path, ckpt_path=last(tmp_path), val_check_interval=every)
    assert first.steps + second.steps == whole.steps
    assert first.validations + second.validations == whole.validations
