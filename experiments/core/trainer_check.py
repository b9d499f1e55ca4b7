"""What Lightning's trainer takes, and a run cannot keep its word with: refused before anything is trained."""

import math
import os

from jsonargparse import Namespace
from lightning import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from experiments.core.errors import ExperimentError

_ABOVE_0 = ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps", "val_check_interval")

# A run must be able to go on from what its config and its last checkpoint hold.
_REFUSED: dict[type[Callback], str] = {
    BackboneFinetuning: "a task has no backbone that could be trained on its own",
    BatchSizeFinder: "no config would hold the size that it finds. Give the data's own",
    LearningRateFinder: "no config would hold the rate that it finds. Compare rates in a study: search",
    OnExceptionCheckpoint: "Lightning would start every later run from it. Go on from last.ckpt, by --ckpt_path",
    ModelPruning: "no checkpoint would hold what it left out",
    SpikeDetection: "Lightning cannot load its state from a checkpoint",
    StochasticWeightAveraging: "no checkpoint would hold its mean. Use WeightAveraging or EMAWeightAveraging",
}


def check_numbers(trainer: Namespace) -> None:
    """Raises ExperimentError for a number among the trainer's settings that Lightning would fail at, or ignore."""
    for name in _ABOVE_0:
        value = trainer[name]
        if isinstance(value, int | float) and not value > 0:
            raise ExperimentError(f"trainer.{name}: {value} does not fit: expected more than 0")
    clip = trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < math.inf:
        raise ExperimentError(f"trainer.gradient_clip_val: {clip} does not fit: expected 0 or more, or null")


def check_trainer(trainer: Trainer) -> None:
    """Raises ExperimentError for processes and callbacks that do not go with a run."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        # What the processes learn of the run is lost with them: its best score, its last step.
        raise ExperimentError(
            "trainer.strategy: its processes are started by spawn or fork, expected a command each. "
            "Give --trainer.strategy=ddp"
        )
    most = most_processes()
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > most:
        raise ExperimentError(
            f"trainer.devices: {trainer.num_devices} processes do not fit this machine of {os.cpu_count()} processors: "
            f"expected at most {most}"
        )
    for callback in trainer.callbacks:
        for kind, why in _REFUSED.items():
            if isinstance(callback, kind):
                raise ExperimentError(f"trainer.callbacks: {kind.__name__} is refused: {why}.")
        if type(callback) is BaseFinetuning:
            raise ExperimentError("trainer.callbacks: BaseFinetuning is abstract: give a class that is based on it.")


def stop_early_after_validations(trainer: Trainer) -> None:
    """Let `EarlyStopping` look when a validation ends, as it does by itself where epochs have several.

    After an epoch, it would come after the validation's checkpoint is written: a run that goes on from that would look
    once more, without a metric.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end is None:
            callback._check_on_train_epoch_end = False


def most_processes() -> int:
    """How many processes of a run, sharing the machine's processors, are not yet a mistake: some on any machine."""
    return max(8, os.cpu_count() or 1)


def most_threads() -> int:
    """How many threads are not yet a mistake: a config for a large machine runs on a small one."""
    return max(256, os.cpu_count() or 1)
