"""What runs beside a training: small callbacks, in the order of a run, and how far it is."""

import csv
import io
import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar, Timer

from experiments.core.errors import write_text, writing
from experiments.core.network_size import layer_table
from experiments.core.run_folder import RunFolder, read_metrics
from experiments.core.task import gathered

_FIRST = ("epoch", "step")  # of the metrics' columns
_SECONDS_BETWEEN_LINES = 10.0


class NetworkFirst(Callback):
    """Builds the task's network before the callbacks after this one are set up: some copy it, or look into it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.setup(stage)


class ModelTable(ModelSummary):
    """Prints the parameters of each part before the training.

    It stands in the place of Lightning's table, which has a row for the whole network and tells 0 FLOPs.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(layer_table(pl_module.task.network), flush=True)


class Beginning(Callback):
    """Calls the functions when training first reaches a step or a validation: a finished run reaches neither."""

    def __init__(self, *functions: Callable[[Trainer], None]) -> None:
        self.was_reached = False
        self._functions = functions

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._reach(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._reach(trainer)

    def _reach(self, trainer: Trainer) -> None:
        if not self.was_reached:
            self.was_reached = True
            for function in self._functions:
                function(trainer)


class RandomState(Callback):
    """Keeps the generators' states of every process in the checkpoint, and puts them back before the first step.

    Processes that start together draw different numbers: else each of them would drop the same features.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._to_restore is None and trainer.global_rank > 0:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # As late as this, since building iterators and Lightning's sanity check may draw random numbers too.
        if self._to_restore is not None:
            states = self._to_restore["processes"]
            _set_state(states[trainer.global_rank % len(states)])
            self._to_restore = None

    def state_dict(self) -> dict[str, Any]:
        return {"processes": gathered(_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._to_restore = state_dict


class Divergence(Callback):
    """Remembers the first training step whose loss is no finite number. It costs no transfer from the device."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None  # (), 0 while there is none

    @property
    def step(self) -> int | None:
        """That step, counted from 1; None where every loss was finite."""
        return None if self._first is None else int(self._first) or None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"]
        first = torch.zeros((), device=loss.device) if self._first is None else self._first.to(loss.device)
        self._first = torch.where((first == 0) & ~loss.isfinite(), float(trainer.global_step), first)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first = torch.tensor(float(state_dict["step"] or 0))


class MetricsFile(Callback):
    """Writes the metrics of every `log_every_n_steps`-th training step, of each validation and of the test.

    `step` counts the training steps done. Each row is on disk before the checkpoint of that step is written, so a run
    that goes on from a checkpoint, even one that was killed, ends with the file of an uninterrupted one: the rows after
    the checkpoint are taken away by `begin`.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._columns: list[str] = list(_FIRST)

    def begin(self, trainer: Trainer) -> None:
        """Leave in the file what was logged until here, if the run goes on."""
        if trainer.is_global_zero:
            rows = _untested(read_metrics(self._folder.metrics))
            self._rewrite([row for row in rows if int(row["step"]) <= trainer.global_step])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0 and _steps_now(trainer, batch_idx):
            self._write(trainer, "train/")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, "val/")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._rewrite(_untested(read_metrics(self._folder.metrics)))  # of a run that was killed as it reported
        self._write(trainer, "test/")

    def _write(self, trainer: Trainer, prefix: str) -> None:
        values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
        if not trainer.is_global_zero or not values:
            return
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, **values}
        if row.keys() <= set(self._columns):
            with writing(self._folder.metrics), self._folder.metrics.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._rewrite([*read_metrics(self._folder.metrics), row])

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        names = {name for row in rows for name in row}
        self._columns = [*_FIRST, *sorted(names - set(_FIRST))]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._folder.metrics, text.getvalue())


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


def _state() -> dict[str, Any]:
    """The states of the CPU's generator and of every CUDA device's, as byte tensors."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_state(state: dict[str, Any]) -> None:
    """Put the generators into a state that `_state` gave; devices that are not here are passed over."""
    torch.set_rng_state(state["cpu"].cpu())
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state.cpu(), device)


def _untested(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of training and validation."""
    return [row for row in rows if not any(name.startswith("test/") for name in row)]


def _steps_now(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the batch completed a step, where several batches make one."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches


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
