"""The best and the last checkpoint, and stopping a run so that it can go on."""

import os
import pickle
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from experiments.core.errors import ExperimentError


def check_checkpoint(path: Path) -> None:
    """Raises ExperimentError for a file that is not there, is damaged, or holds more than values: code could run."""
    if not path.is_file():
        raise ExperimentError(f"{path}: no such checkpoint.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ExperimentError(
            f"{path}: refused: no checkpoint, damaged, or with more than values ({reason})"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ExperimentError(f"{path}: not a checkpoint that `fit` wrote: it has no state_dict.")


def best_checkpoint(
    folder: Path | None = None,
) -> ModelCheckpoint:
    """Keeps `best.ckpt`, of the fewest bits per symbol in validation, in the folder; in the run's own if None."""
    # Saved when the validation ends, not when the epoch does, which a run stopped by Ctrl-C would miss.
    return ModelCheckpoint(
        folder, "best", monitor="val/bpc", save_on_train_epoch_end=False, enable_version_counter=False
    )


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` beside the best checkpoint: after each validation, where Ctrl-C stops the run, and at its end.

    The first Ctrl-C lets the step under way finish, and the validation that follows it, if one is due: only there the
    whole state is consistent, and a resumed run equals an uninterrupted one. The second stops at once, and the
    `last.ckpt` of before stays. A run that reaches its `max_steps` ends with a validation, whenever the last one was.

    (ModelCheckpoint's own `save_last` writes only when the monitored score is among the best.)

    Args:
        best: the callback of the best checkpoint.
        path: the checkpoint that the run goes on from, if any.
    """

    def __init__(
        self,
        best: ModelCheckpoint,
        path: Path | None = None,
    ) -> None:
        self.path = path
        self._best = best
        self._saved_step: int | None = None
        self._stop_requested = False
        self._saved_for_stop = False
        self._previous_handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._previous_handler = signal.signal(signal.SIGINT, self._request_stop)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_if_saved()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            # Lightning validates a run that is told to stop, but not one that merely ends.
            trainer.should_stop = True
        if self._stop_requested:
            self._save(trainer)
            self._saved_for_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._save(trainer)
        self._saved_for_stop = self._stop_requested
        self._stop_if_saved()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handler()
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        self._stop_if_saved()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handler()

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        if self._stop_requested:
            raise KeyboardInterrupt
        self._stop_requested = True
        print(
            "\nStopping after this step, or after the validation under way. Press Ctrl-C again to stop at once.",
            flush=True,
        )

    def _stop_if_saved(self) -> None:
        if self._saved_for_stop:
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        path = Path(self._best.dirpath or trainer.default_root_dir) / "last.ckpt"
        # Written aside and moved, so that a crash while writing leaves the one of before.
        part = path.with_suffix(".part")
        trainer.save_checkpoint(part, weights_only=False)
        os.replace(part, path)
        self.path, self._saved_step = path, trainer.global_step

    def _restore_handler(self) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None
