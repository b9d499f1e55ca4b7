"""Runs that Ctrl-C stops and that go on, to be held against one that nobody stopped."""

import os
import signal

import pytest
from lightning import Callback, Trainer

from experiments.core.callbacks import RandomState
from experiments.core.run_folder import RunFolder
from experiments.core.saving import Checkpoints


def trainer(folder, *callbacks, ckpt_path=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run_folder = RunFolder(folder, "run", ckpt_path)
    run_folder.make()
    of_run = [*callbacks, RandomState(), Checkpoints(run_folder)]
    return Trainer(callbacks=of_run, accelerator="cpu", **quiet, **settings)


def last(folder):
    return folder / "run" / "version_0" / "checkpoints" / "last.ckpt"


class Record(Callback):
    """What a run did: the loss, the rate and a number of the batch of each step, and each validation."""

    def __init__(self, of_batch=lambda batch: None):
        self.steps, self.validations, self.best, self.of_batch = [], [], None, of_batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append((outputs["loss"].item(), rate, self.of_batch(batch)))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validations.append(trainer.callback_metrics[pl_module.task.monitored].item())


class Interrupt(Callback):
    """Presses Ctrl-C in one step, or in the first batch of the validation after it."""

    def __init__(self, step, in_validation):
        self.step, self.in_validation = step, in_validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.in_validation and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.in_validation and trainer.global_step == self.step and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGINT)


def stopped(run, folder, record, step, in_validation=False, **settings):
    """The record of a run that Ctrl-C stops."""
    with pytest.raises(SystemExit):
        run(folder, record, Interrupt(step, in_validation), **settings)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return record


def assert_together(records, whole):
    """The parts of a run did what the whole one did."""
    assert [step for record in records for step in record.steps] == whole.steps
    assert [score for record in records for score in record.validations] == whole.validations
