"""How far a run is: a bar in a terminal, plain lines elsewhere."""

import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, Timer

_SECONDS_BETWEEN_LINES = 10.0


def progress_bar() -> ProgressBar:
    """The bar where the output is a terminal, else the lines."""
    return _Bar() if sys.stdout.isatty() else Lines()


class _Speed:
    """What is trained on in a second, and how long the training still takes; validations are not counted."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._last = time.monotonic()
        self._seconds, self._weight, self._steps = 0.0, 0, 0

    def pause(self) -> None:
        """The time since the last batch was no training."""
        self._last = time.monotonic()

    def count(self, trainer: Trainer, outputs: Any) -> None:
        """Take in a batch that was trained on."""
        now = time.monotonic()
        if self._steps == 0:
            # The first step compiles: its time says nothing of the others'.
            self._last = now
        self._steps += 1
        self._seconds, self._last = self._seconds + now - self._last, now
        self._weight += (outputs or {}).get("weight", 0) * trainer.world_size * (self._steps > 1)

    def shown(self, trainer: Trainer) -> dict[str, str]:
        """Such as {"symbols/s": "31,000", "left": "0:02:10"}; empty before there is something to tell from."""
        if not self._seconds:
            return {}
        speed = {f"{self._unit}/s": f"{_rounded(self._weight / self._seconds):,}"}
        left = self._seconds / (self._steps - 1) * _batches_left(trainer)
        for timer in trainer.callbacks:
            if isinstance(timer, Timer) and (remaining := timer.time_remaining()) is not None:
                left = min(left, remaining)
        return speed if math.isinf(left) else speed | {"left": str(timedelta(seconds=max(0, round(left))))}


class Lines(ProgressBar):
    """A line every ten seconds and one after each validation, for files and other places without a cursor."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._printed_at = -math.inf

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._speed = _Speed(_unit(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._speed.count(trainer, outputs)
        if time.monotonic() - self._printed_at > _SECONDS_BETWEEN_LINES:
            self._line(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._line(trainer, pl_module)
            self._speed.pause()

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
        shown = {"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics, **self._speed.shown(trainer)}
        if self._enabled:
            print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


class _Bar(RichProgressBar):
    """Lightning's bar, with the speed and the time that the whole training still takes."""

    _speed: _Speed | None = None  # while it trains

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._speed = _Speed(_unit(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._speed is not None
        self._speed.count(trainer, outputs)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._speed is not None:
            self._speed.pause()

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description.replace("/-2", "")  # of a run without a number of epochs

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return metrics if self._speed is None else metrics | self._speed.shown(trainer)


def _unit(pl_module: LightningModule) -> str:
    return getattr(pl_module, "unit", "examples")


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
