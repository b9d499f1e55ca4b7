"""How far a run is: a bar in a terminal, plain lines elsewhere."""

import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, Timer

_SECONDS_BETWEEN_LINES = 10.0


def progress_bar(speed: "Speed") -> ProgressBar:
    """The bar where the output is a terminal, else the lines. The speed must come before it among the callbacks."""
    return _Bar(speed) if sys.stdout.isatty() else Lines(speed)


class Speed(Callback):
    """How fast the training is: validations and a process's first step, which compiles, are left out."""

    def __init__(self) -> None:
        self._seconds, self._steps, self._batches, self._weight = 0.0, 0, 0, 0
        self._last: tuple[float, int] | None = None  # when the last batch ended, and the steps done by then

    @property
    def seconds_per_step(self) -> float | None:
        """None where there were too few steps to tell."""
        return self._seconds / self._steps if self._steps else None

    def shown(self, trainer: Trainer, unit: str) -> dict[str, str]:
        """Such as {"symbols/s": "31,000", "left": "0:02:10"}; empty before there is something to tell from."""
        if not self._seconds:
            return {}
        speed = {f"{unit}/s": f"{_rounded(self._weight / self._seconds):,}"}
        left = self._seconds / self._batches * _batches_left(trainer)
        for timer in trainer.callbacks:
            if isinstance(timer, Timer) and (remaining := timer.time_remaining()) is not None:
                left = min(left, remaining)
        return speed if math.isinf(left) else speed | {"left": str(timedelta(seconds=max(0, round(left))))}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._last is not None:
            self._seconds += now - self._last[0]
            self._steps += trainer.global_step - self._last[1]
            self._batches += 1
            self._weight += outputs["weight"] * trainer.world_size
        self._last = now, trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is not None:
            self._last = time.monotonic(), self._last[1]

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds, "steps": self._steps, "batches": self._batches, "weight": self._weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._steps = state_dict["seconds"], state_dict["steps"]
        self._batches, self._weight = state_dict["batches"], state_dict["weight"]


class Lines(ProgressBar):
    """A line every ten seconds and one after each validation, for files and other places without a cursor."""

    def __init__(self, speed: Speed) -> None:
        super().__init__()
        self._speed = speed
        self._enabled = True
        self._printed_at = -math.inf

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._printed_at > _SECONDS_BETWEEN_LINES:
            self._line(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._line(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking:
            self._evaluated("validation", args[2], trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._evaluated("test", args[2], trainer.num_test_batches)

    def _evaluated(self, what: str, batch_idx: int, batches: list[int | float]) -> None:
        if self._enabled and time.monotonic() - self._printed_at > _SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            print(f"{what}: batch {batch_idx + 1} of {sum(batches)}", flush=True)

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed_at = time.monotonic()
        metrics = {
            name: f"{value:.4g}" for name, value in trainer.progress_bar_metrics.items() if isinstance(value, float)
        }
        shown = {"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics}
        shown |= self._speed.shown(trainer, pl_module.task.unit)
        if self._enabled:
            print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


class _Bar(RichProgressBar):
    """Lightning's bar, with the speed and the time that the whole training still takes."""

    def __init__(self, speed: Speed) -> None:
        super().__init__()
        self._speed = speed

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description.replace("/-2", "")  # of a run without a number of epochs

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return metrics | self._speed.shown(trainer, pl_module.task.unit)


def _batches_left(trainer: Trainer) -> float:
    """The batches until `max_epochs` or `max_steps`, whichever is first; infinite where neither is set."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    epochs = trainer.max_epochs
    left = math.inf
    if epochs is not None and epochs >= 0:
        left = (epochs - trainer.current_epoch) * trainer.num_training_batches - done
    if trainer.max_steps >= 0:
        left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
    return left


def _rounded(number: float) -> int:
    """To two digits."""
    digits = max(0, math.floor(math.log10(number)) - 1) if number >= 1 else 0
    return round(number / 10**digits) * 10**digits
