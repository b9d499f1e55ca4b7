"""The commands `fit`, `validate` and `test`: Lightning's trainer with this project's defaults."""

import logging
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
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments.core.callbacks import Beginning, Divergence, MetricsFile, ModelTable, NetworkFirst, RandomState
from experiments.core.checkpoints import read_checkpoint
from experiments.core.command_line import Invocation
from experiments.core.errors import ExperimentError, WritingError, building, write_text
from experiments.core.module import DataModule, TaskModule
from experiments.core.progress import Speed, progress_bar
from experiments.core.records import read_result
from experiments.core.run_folder import RunFolder
from experiments.core.run_report import RunReport, shown
from experiments.core.run_settings import RunSettings
from experiments.core.saving import Checkpoints, SaveTheRest
from experiments.core.trainer_check import check_numbers, check_trainer, most_threads, stop_early_after_validations

# Lightning's notes on devices and its advertisements; warnings and errors stay.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
# Lightning's own affair with torch 2.13.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")

# How those of Lightning's and torch's errors begin that a setting causes once training is under way.
MISTAKES = ("Early stopping conditioned on metric", "`val_check_interval`", "Function '")


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


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
