"""The commands `fit`, `validate` and `test`: Lightning's trainer with this project's defaults and limits."""

import logging
import math
import os
import shlex
import signal
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from jsonargparse import Namespace
from lightning import Callback, Trainer, seed_everything
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
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments.core.callbacks import (
    Beginning,
    Divergence,
    MetricsFile,
    ModelTable,
    NetworkFirst,
    RandomState,
    Speed,
    progress_bar,
)
from experiments.core.command_line import Invocation
from experiments.core.errors import ExperimentError, WritingError, building, write_text
from experiments.core.loading import RunSettings, checkpoint_in, read_checkpoint
from experiments.core.module import DataModule, TaskModule
from experiments.core.run_folder import RunFolder, read_result
from experiments.core.run_report import RunReport, shown
from experiments.core.saving import Checkpoints, SaveTheRest

# Lightning's notes on devices and its advertisements; warnings and errors stay.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
# Lightning's own affair with torch 2.13.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")

# How those of Lightning's and torch's errors begin that a setting causes once training is under way.
MISTAKES = ("Early stopping conditioned on metric", "`val_check_interval`", "Function '")


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


def main(invocation: Invocation) -> None:
    """Run `fit`, `validate` or `test`."""
    is_main_thread = threading.current_thread() is threading.main_thread()  # only there handlers can be set
    # Where no training is under way, nothing is to be saved. Lightning's own handler would end with success.
    previous = signal.signal(signal.SIGTERM, _terminate) if is_main_thread else None
    try:
        _Run(invocation)()
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, previous)


class _Run:
    """One command; everything it needs stands in YAML files and options.

    A run is kept below `runs/NAME/version_N`, see `RunFolder`. Checkpoints are loaded with `weights_only=True`.

    Raises: ExperimentError and MultintError for the user's mistakes, argparse.ArgumentError for a bad config.
    """

    def __init__(self, invocation: Invocation) -> None:
        self._command, self._trusted = invocation.argv[0], invocation.trusted
        self._settings = RunSettings(invocation.argv, Trainer)
        self._config = config = self._settings.config
        _check(config)
        self._checkpoint: str | None = config.ckpt_path
        if self._checkpoint is None and self._command != "fit":
            raise ExperimentError(f"{self._command} needs a checkpoint: --ckpt_path CKPT.")
        if self._checkpoint is not None:
            if self._command != "fit":
                self._checkpoint = str(checkpoint_in(Path(self._checkpoint)))
            elif Path(self._checkpoint).is_dir():
                raise ExperimentError(
                    f"--ckpt_path: {self._checkpoint} is a folder, expected the checkpoint to go on from, as "
                    f"{Path(self._checkpoint) / 'checkpoints' / 'last.ckpt'}."
                )
            read_checkpoint(Path(self._checkpoint))
        if config.seed_everything is not False:
            seed = None if config.seed_everything is True else config.seed_everything
            config.seed_everything = seed_everything(seed, workers=True)
        if config.threads:
            torch.set_num_threads(config.threads)
        root = Path(config.trainer.default_root_dir or "runs")
        self._folder = RunFolder(root, config.name, Path(self._checkpoint) if self._checkpoint else None)
        self._checkpoints = Checkpoints(self._folder, config.save_every)
        self._metrics, self._divergence, self._speed = MetricsFile(self._folder), Divergence(), Speed()
        self._beginning = Beginning(self._write_config, self._metrics.begin)

    def __call__(self) -> None:
        """Train, then test the best checkpoint and say what came of it; or evaluate a checkpoint."""
        data = None if self._settings.data is None else DataModule(self._settings.data)
        model = TaskModule(self._settings.task)
        trainer = self._trainer()
        with self._settings.explained():
            if self._command == "fit":
                self._fit(trainer, model, data)
            else:
                self._evaluate(trainer, model, data)

    def _evaluate(self, trainer: Trainer, model: TaskModule, data: DataModule | None) -> None:
        with warnings.catch_warnings():  # of callbacks that only training has
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")
            given = {"datamodule": data, "ckpt_path": self._checkpoint, "verbose": self._config.verbose}
            getattr(trainer, self._command)(model, weights_only=True, **given)

    def _trainer(self) -> Trainer:
        settings = {**self._settings.built.trainer.as_dict()}
        is_fit, is_trial = self._command == "fit", settings["fast_dev_run"]
        callbacks = settings["callbacks"] or []
        settings["callbacks"] = [*(callbacks if isinstance(callbacks, list) else [callbacks]), *self._callbacks()]
        if settings["logger"] in (None, True):
            settings["logger"] = False
        if is_fit and not is_trial and rank_zero_only.rank == 0:
            self._folder.make()
            settings["default_root_dir"] = self._folder.path  # where other callbacks write
            if self._config.tensorboard:
                with building("the logger for TensorBoard"):
                    settings["logger"] = TensorBoardLogger(self._folder.path, name="", version="tensorboard")
        try:
            with building("the trainer"):
                trainer = Trainer(**settings)
            check_trainer(trainer)
            stop_early_after_validations(trainer)
            trainer.callbacks.insert(0, NetworkFirst())
            if is_fit:
                trainer.callbacks.insert(0, SaveTheRest(self._checkpoints))
            return trainer
        except BaseException:
            if is_fit:
                self._folder.discard()
            raise

    def _callbacks(self) -> list[Callback]:
        trainer, callbacks = self._config.trainer, list[Callback]()
        if self._command == "fit":
            callbacks += [self._speed]
        if trainer.enable_progress_bar in (None, True):
            callbacks += [progress_bar(self._speed)]
        if trainer.enable_model_summary in (None, True):
            callbacks += [ModelTable()]
        if self._command == "fit":
            callbacks += [RandomState(), self._divergence, self._checkpoints]
            if not trainer.fast_dev_run:
                callbacks += [self._beginning, self._metrics]
        return callbacks

    def _fit(self, trainer: Trainer, model: TaskModule, data: DataModule | None) -> None:
        report = RunReport(trainer, model, self._folder, self._checkpoints, self._divergence, self._speed)
        try:
            trainer.fit(model, datamodule=data, ckpt_path=self._checkpoint, weights_only=True)
            if trainer.fast_dev_run:
                return
            is_unreported = self._folder.is_resumed and read_result(self._folder.result) is None
            if not (self._beginning.was_reached or is_unreported):
                self._refuse_to_go_on()
            report()
        except SystemExit:
            # The other processes may not know the folder yet.
            if rank_zero_only.rank == 0 and not trainer.fast_dev_run and not report.is_written:
                print(self._how_to_go_on())
            raise
        except WritingError as error:
            if rank_zero_only.rank == 0:
                raise WritingError(f"{error} {self._what_is_kept()}") from error
            raise
        except (RuntimeError, ValueError) as error:
            first_line = str(error).strip().partition("\n")[0]
            if first_line.startswith(MISTAKES):
                raise ExperimentError(first_line) from error
            raise
        finally:
            if rank_zero_only.rank == 0 and not self._beginning.was_reached:
                self._folder.discard()

    def _refuse_to_go_on(self) -> None:
        if self._checkpoint is None:
            raise ExperimentError("there is nothing to train: max_epochs, max_steps or limit_train_batches is 0.")
        raise ExperimentError(
            f"{self._checkpoint}: this run is finished. To go on, raise what ended it: --trainer.max_epochs, "
            "--trainer.max_steps or --trainer.max_time."
        )

    def _write_config(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self._folder.result.unlink(missing_ok=True)  # of a run that now goes on
            config = self._config.clone()
            config.ckpt_path = None  # who runs the file again trains anew
            write_text(self._folder.config, self._settings.text(config))

    def _what_is_kept(self) -> str:
        if not self._folder.last.is_file():
            return "No checkpoint was written. Make room, or choose another place by --trainer.default_root_dir."
        return f"Kept: {shown(self._folder.last)}. Make room. {self._how_to_go_on()}"

    def _how_to_go_on(self) -> str:
        if not self._folder.last.is_file():
            return "Stopped before the first checkpoint."
        command = ["python", "-m", "experiments", "fit", "--config", shown(self._folder.config), "--ckpt_path"]
        trust = [word for module in self._trusted for word in ("--trust", module)]
        return f"Stopped. Go on with:\n{shlex.join([*command, shown(self._folder.last), *trust])}"


def _check(config: Namespace) -> None:
    check_numbers(config.trainer)
    if (config.threads or 1) > most_threads():
        raise ExperimentError(f"threads: {config.threads} does not fit: expected at most {most_threads()}")
    # A truth value asks Lightning for a random seed, or for none.
    if not 0 <= (config.seed_everything or 0) < 2**32:
        raise ExperimentError(
            f"seed_everything: {config.seed_everything} does not fit: expected 0 to {2**32 - 1}, true or false"
        )


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


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
