"""`metrics.csv`: what a run logged, a row for each time."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from experiments.core.errors import write_text, writing
from experiments.core.run_folder import RunFolder

_FIRST = ("epoch", "step")


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


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, each with what it has a value for; none where there is no file.

    A last row that was being written when the run was killed is left out.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{name: value for name, value in row.items() if value} for row in csv.DictReader(lines)]


def _untested(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of training and validation."""
    return [row for row in rows if not any(name.startswith("test/") for name in row)]


def _steps_now(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the batch completed a step, where several batches make one."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches
