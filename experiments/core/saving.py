"""The best and the last checkpoint of a run, and stopping it so that it can go on."""

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from experiments.core.errors import ExperimentError, WritingError, copy, writing
from experiments.core.loading import read_checkpoint
from experiments.core.run_folder import RunFolder


class Checkpoints(Checkpoint):
    """Keeps `best.ckpt`, of the best monitored metric in validation, and `last.ckpt`.

    `last.ckpt` is written after each validation, every so many minutes, where a signal stops the run, and at its end;
    both always aside first, so that a run killed while it writes has the file of before.

    The first Ctrl-C or SIGTERM lets the step under way finish, and the validation that follows it, if one is due: only
    there the whole state is consistent, and a resumed run equals an uninterrupted one. The second stops at once. Then
    SystemExit is raised with the code 128 + the signal's number, and `was_stopped` is true. With several processes it
    is enough that one of them gets the signal.

    A run that reaches its `max_steps` ends with a validation, whenever the last one was.

    Args:
        folder: where the two lie.
        every: minutes between two writes of `last.ckpt`.

    Raises: ExperimentError where the folder cannot be written.
    """

    def __init__(self, folder: RunFolder, every: float = 5.0) -> None:
        self.folder = folder
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._every = every
        self._saved_step: int | None = None
        self._saved_at = 0.0
        self._signal: int | None = None  # that asked to stop
        self._saved_for_stop = False
        self._previous_handlers: dict[int, Any] = {}

    @property
    def was_stopped(self) -> bool:
        return self._signal is not None

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:
            self.folder.share(trainer.strategy.broadcast)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        self._saved_step = trainer.global_step
        loop, progress = trainer.fit_loop, trainer.fit_loop.epoch_progress.current
        if loop.restarted_mid_epoch and progress.ready == progress.processed:
            # Saved after an epoch's last step. Lightning 2.6 would not count the next epoch as begun, and a checkpoint
            # of that would begin it anew.
            loop.reset_restart_stage()
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._find_best()
        # Only the first process looks, and all must test the best one, or none.
        self.best_score, self.best_step = trainer.strategy.broadcast((self.best_score, self.best_step))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._request_stop)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_if_saved()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            # Lightning validates a run that is told to stop, but not one that merely ends.
            trainer.should_stop = True
        if (batch_idx + 1) % trainer.accumulate_grad_batches and batch_idx + 1 < trainer.num_training_batches:
            return  # in the middle of a step of several batches, whose gradients no checkpoint holds
        is_due = time.monotonic() - self._saved_at > 60 * self._every
        stop, is_due = self._agreed(trainer, self.was_stopped, is_due)
        # Lightning takes a checkpoint of this moment for one after the validation. That comes now, and is saved.
        if (stop or is_due) and not _validation_follows(trainer, batch_idx):
            self._save(trainer)
            self._saved_for_stop = stop

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        task = pl_module.task
        if task.monitored not in trainer.callback_metrics:
            names = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ExperimentError(f"{type(task).__name__}: its monitor is {task.monitored}, not one of {names}.")
        score = trainer.callback_metrics[task.monitored].item()
        sign = 1 if task.monitor.mode == "min" else -1
        is_best = math.isfinite(score) and (self.best_score is None or sign * score < sign * self.best_score)
        if is_best:
            self.best_score, self.best_step = score, trainer.global_step
        stop, _ = self._agreed(trainer, self.was_stopped, False)
        self._save(trainer, is_best)
        self._saved_for_stop = stop
        self._stop_if_saved()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_the_rest(trainer)
        self._restore_handlers()
        [self._saved_for_stop] = self._agreed(trainer, self.was_stopped)
        self._stop_if_saved()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def save_the_rest(self, trainer: Trainer) -> None:
        """Write what the last checkpoint is without."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _find_best(self) -> None:
        """Forget a best checkpoint that is not there: it was removed, or was overwritten by a later one."""
        best = self.folder.best
        if best.is_file() and not self.folder.is_resumed and read_checkpoint(best)["global_step"] != self.best_step:
            best.unlink()  # of the run that this one was started from, but later than its start
        if not best.is_file():
            self.best_score = self.best_step = None

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        if self.was_stopped:
            raise SystemExit(128 + signum)
        self._signal = signum
        again = "Press Ctrl-C again to stop at once." if signum == signal.SIGINT else ""
        print(f"\nStopping after this step, or after the validation under way. {again}".rstrip(), flush=True)

    def _agreed(self, trainer: Trainer, *flags: bool) -> list[bool]:
        """Each flag, true for all processes where it is for one: they must save and stop at the same step."""
        if trainer.world_size == 1:
            return list(flags)
        counts = torch.tensor([float(flag) for flag in flags], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]

    def _stop_if_saved(self) -> None:
        if self._saved_for_stop:
            self._signal = self._signal or signal.SIGTERM  # where another process got it
            raise SystemExit(128 + self._signal)

    def _save(self, trainer: Trainer, is_best: bool = False) -> None:
        if trainer.fast_dev_run:
            return
        # Written aside and moved, so that a crash while writing leaves the one of before. The best one first: a
        # `last.ckpt` that knows of a best one must not be there before it.
        aside = self.folder.checkpoints / "writing.part"
        with writing(self.folder.checkpoints):
            try:
                trainer.save_checkpoint(aside, weights_only=False)
                if trainer.is_global_zero:
                    if is_best:
                        copy(aside, self.folder.best)
                    os.replace(aside, self.folder.last)
            except (OSError, WritingError):
                aside.unlink(missing_ok=True)
                raise
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


class SaveTheRest(Callback):
    """Writes the last steps when training ends, before the callbacks after this one: some change the weights then."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._checkpoints.save_the_rest(trainer)


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation comes between this batch and the next."""
    every = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    done = (trainer.fit_loop.total_batch_idx if every is None else batch_idx) + 1
    interval = trainer.val_check_batch or math.inf  # None where validations come by the clock
    return trainer.should_stop or done % (trainer.num_training_batches if math.isinf(interval) else interval) == 0
