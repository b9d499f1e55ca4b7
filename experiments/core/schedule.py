"""The learning rate in the course of a run."""

import math
from typing import Any

from lightning import Callback, LightningModule, Trainer

from experiments.core.errors import ExperimentError


class HalveLearningRate(Callback):
    """Halves the learning rate after `after` validations in a row without a gain, however small.

    (Lightning's own schedule on a metric acts after the validation's checkpoint is written, so that a resumed run would
    miss a step of it.)

    Raises: ExperimentError for an `after` below 1.
    """

    def __init__(self, after: int, metric: str, mode: str) -> None:
        if after < 1:
            raise ExperimentError(f"halve_after is {after}, expected at least 1, or null.")
        self._after, self._metric, self._sign = after, metric, 1 if mode == "min" else -1
        self._best, self._without_gain = math.inf, 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._metric not in trainer.callback_metrics:
            return
        score = self._sign * trainer.callback_metrics[self._metric].item()
        if score < self._best:
            self._best, self._without_gain = score, 0
            return
        self._without_gain += 1
        if self._without_gain == self._after:
            self._without_gain = 0
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] / 2

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "without_gain": self._without_gain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._without_gain = state_dict["best"], state_dict["without_gain"]


class CosineLearningRate(Callback):
    """Lets the learning rate fall from the optimizer's to 0 over the run's `max_steps`: half a cosine.

    Raises: ExperimentError for a run without `max_steps`.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.max_steps < 1:
            raise ExperimentError("CosineLearningRate: the run has no end, expected one: --trainer.max_steps N.")
        factor = (1 + math.cos(math.pi * trainer.global_step / trainer.max_steps)) / 2
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                # Kept among the optimizer's settings, and so in the checkpoint.
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
