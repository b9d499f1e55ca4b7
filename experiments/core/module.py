"""A task and its data as Lightning trains them. All else of a task can be had without Lightning."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from experiments.core.errors import ExperimentError
from experiments.core.optimisation import AverageWeights, LearningRate, halving
from experiments.core.task import Data, Mean, Stage, Task, averaged, summed

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


class TaskModule(LightningModule):
    """Trains a task's network, logs its metrics, and writes and reads what a checkpoint holds of it.

    The metrics are logged as `train/NAME`, `val/NAME` and `test/NAME`: in training those of a batch, in evaluation
    those of all that was seen, exactly, in all processes together.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.network = task.network  # whose weights are in the checkpoint
        for name in _LOADERS:
            if hasattr(task, name):
                setattr(self, name, getattr(task, name))
        self._means = StreamMeans()  # of the evaluation under way

    def setup(self, stage: str) -> None:
        """Build the network for the data, if it is not there yet."""
        data = self.trainer.datamodule
        self.task.use(self.task.describe(None if data is None else data.data), "the data given")
        self.network = self.task.network

    def configure_optimizers(self) -> Optimizer:
        return self.task.optimizer()

    def configure_callbacks(self) -> list[Callback]:
        task, callbacks = self.task, list[Callback]()
        if task.halve_after is not None:
            if any(isinstance(callback, LearningRate) for callback in self.trainer.callbacks):
                raise ExperimentError("LearningRate: the run has two schedules, halve_after is the other. Give one.")
            callbacks.append(halving(task.halve_after, task.monitor.mode))
        if task.average_after is not None:
            callbacks.append(AverageWeights(task.average_after, task.monitored, task.monitor.mode))
        return callbacks

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        means = self.task.measure(batch, "train")
        if "loss" not in means:
            raise ExperimentError(
                f"{type(self.task).__name__}: measure gives {', '.join(means)}, expected a loss in training."
            )
        # A metric of the processes' mean loss, which is not the mean of their metrics.
        reduced = {name: averaged(mean.value) for name, mean in means.items()}
        self._log("train", self.task.metrics(reduced, "train"))
        objective = means["loss"].value
        if "penalty" in means:
            objective = objective + means["penalty"].value
        return {"loss": objective, "weight": means["loss"].weight}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._means.update(self.task.measure(batch, "val"))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._means.update(self.task.measure(batch, "test"))

    def on_validation_epoch_end(self) -> None:
        self.task.is_trial = self.trainer.sanity_checking
        self._log("val", self.task.metrics(self._means.compute(), "val"))
        self.task.is_trial = False

    def on_test_epoch_end(self) -> None:
        self._log("test", self.task.metrics(self._means.compute(), "test"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.task.checkpoint())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.task.take_up(checkpoint, is_to_train=self._trainer is None or self.trainer.state.fn == "fit")
        self.network = self.task.network

    def _log(self, stage: Stage, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            shown = name == self.task.monitor.name or (stage == "train" and name == "loss")
            # Every process has the same value already; Lightning warns unless told to average.
            self.log(f"{stage}/{name}", value, prog_bar=shown, sync_dist=stage != "train")


class DataModule(LightningDataModule):
    """Gives Lightning what the data give."""

    def __init__(self, data: Data) -> None:
        self.data = data
        super().__init__()
        for name in ("prepare_data", "setup", *_LOADERS):
            if hasattr(data, name):
                setattr(self, name, getattr(data, name))

    @property
    def trainer(self) -> Trainer | None:
        """Who trains on the data."""
        return self.data.trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.data.trainer = trainer


class StreamMeans:
    """The means by name of all batches since the last `compute`, each by its weight: exact for any cut into batches.

    Every process must see the same names, since their sums are exchanged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,) float64: of value · weight, and of the weights

    def update(self, means: Mapping[str, Mean]) -> None:
        """Take in a batch."""
        for name, (value, weight) in means.items():
            # A mean over nothing may be NaN, which no weight would take away.
            weighted = value.detach().double() * weight if weight else torch.zeros_like(value, dtype=torch.float64)
            sums = torch.stack([weighted, torch.full_like(weighted, weight)])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def compute(self) -> dict[str, Tensor]:
        """The means of all batches, over all processes; it starts anew."""
        sums, self._sums = self._sums, {}
        totals = {name: summed(of_name) for name, of_name in sums.items()}
        return {name: (total / weights).float() for name, (total, weights) in totals.items()}
