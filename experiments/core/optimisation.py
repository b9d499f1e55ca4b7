"""The course of a run's optimisation: its learning rate, and the mean of its weights."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import ASGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

from experiments.core.errors import ExperimentError, building
from experiments.core.task import Monitor

_TRAINED = "trained_state_dict"  # in a checkpoint: the weights that training goes on with


class LearningRate(Callback):
    """Lets the learning rate follow one of torch's schedules, or several in turn, by `InTurn`.

    It advances with every training step; `ReduceLROnPlateau` does with every validation, by the task's monitored
    metric. A `T_max` or `total_iters` of −1 lasts to the run's `max_steps`. A run that goes on has the rates of an
    uninterrupted one with the same `max_steps`.

    Args:
        schedule: factory `(optimizer) -> LRScheduler`, of torch.optim.lr_scheduler.

    Raises: ExperimentError for a schedule that cannot be built, for one that lasts to the run's end where the run has
    no `max_steps`, for a `ReduceLROnPlateau` of the wrong `mode`, and for two of these callbacks.
    """

    def __init__(self, schedule: Callable[[Optimizer], LRScheduler]) -> None:
        self._build = schedule
        self._schedules: list[LRScheduler] = []  # one for each optimizer
        self._saved: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if sum(isinstance(callback, LearningRate) for callback in trainer.callbacks) > 1:
            raise ExperimentError("LearningRate: the run has two schedules, expected one.")
        self._schedules = [
            self._started(optimizer, trainer, pl_module.task.monitor) for optimizer in trainer.optimizers
        ]

    def _started(self, optimizer: Optimizer, trainer: Trainer, monitor: Monitor) -> LRScheduler:
        reached = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        with building("LearningRate: the schedule"):
            schedule = self._build(optimizer)
        _last(schedule, trainer.max_steps)
        if isinstance(schedule, ReduceLROnPlateau):
            if schedule.mode != monitor.mode:
                raise ExperimentError(
                    f"LearningRate: the mode is {schedule.mode}, expected {monitor.mode}, as of {monitor.name}."
                )
            for group, rate in zip(optimizer.param_groups, reached, strict=True):
                group["lr"] = rate
            if self._saved:
                schedule.load_state_dict(self._saved.pop(0))
        return schedule

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        with warnings.catch_warnings():
            # A run that goes on walks its schedule from the start, before the optimizer's first step in this process.
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)`")
            for schedule in self._schedules:
                while not isinstance(schedule, ReduceLROnPlateau) and schedule.last_epoch < trainer.global_step:
                    schedule.step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitored = pl_module.task.monitored
        if trainer.state.fn != "fit" or trainer.sanity_checking or monitored not in trainer.callback_metrics:
            return
        # Here, since Lightning would do it after the validation's checkpoint is written: a resumed run would miss it.
        for schedule in self._schedules:
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(trainer.callback_metrics[monitored].item())

    def state_dict(self) -> dict[str, Any]:
        of_metrics = [schedule for schedule in self._schedules if isinstance(schedule, ReduceLROnPlateau)]
        return {"schedules": [schedule.state_dict() for schedule in of_metrics]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = list(state_dict["schedules"])


class InTurn(SequentialLR):
    """Schedules one after the other, as a warm-up and a cosine: torch's `SequentialLR`, for a config.

    Args:
        optimizer: whose rate it is.
        schedules: factories `(optimizer) -> LRScheduler`.
        milestones: the steps at which the second and each later one begins.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedules: list[Callable[[Optimizer], LRScheduler]],
        milestones: list[int],
    ) -> None:
        super().__init__(optimizer, [schedule(optimizer) for schedule in schedules], milestones)


def halving(after: int, mode: Literal["min", "max"]) -> LearningRate:
    """Halves the learning rate after so many validations in a row without a gain, however small."""
    exact = {"threshold": 0.0, "threshold_mode": "abs", "eps": 0.0}
    return LearningRate(partial(ReduceLROnPlateau, mode=mode, factor=0.5, patience=after - 1, **exact))


def _last(schedule: LRScheduler, steps: int) -> None:
    """Let the schedule, where its length is −1, last so many steps, or raise ExperimentError where they are not set."""
    if isinstance(schedule, SequentialLR):
        begins = [0, *schedule._milestones, steps]
        for part, (first, end) in zip(schedule._schedulers, pairwise(begins), strict=True):
            _last(part, max(1, end - first) if end >= 0 else -1)
    for length in ("T_max", "total_iters"):
        if getattr(schedule, length, None) == -1:
            if steps < 1:
                raise ExperimentError(
                    f"LearningRate: {length} is -1 and the run has no end, expected one: --trainer.max_steps N."
                )
            setattr(schedule, length, steps)


class AverageWeights(Callback):
    """Non-monotonically triggered averaging, NT-ASGD, by the averages that torch's `ASGD` keeps.

    The mean of the weights begins at the first validation whose score is worse than the best of all but the `after`
    validations before it. From then on the validations of the run and the weights in checkpoints are those of the
    mean; training goes on with its own weights, which checkpoints hold too.

    Raises: ExperimentError for another optimizer.
    Source: Merity et al. 2018 (AWD-LSTM), algorithm 1.
    """

    def __init__(self, after: int, metric: str, mode: str) -> None:
        self._after, self._metric, self._sign = after, metric, 1 if mode == "min" else -1
        self._scores: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, ASGD):
                raise ExperimentError(
                    f"average_after: the optimizer is {type(optimizer).__name__}, expected ASGD, which keeps the mean "
                    "of the weights."
                )
            for group in optimizer.param_groups:
                if not self._scores:
                    group["t0"] = math.inf  # until then the mean is the weights themselves

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            _exchange(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        _exchange(trainer)
        if trainer.sanity_checking or self._metric not in trainer.callback_metrics:
            return
        score = self._sign * trainer.callback_metrics[self._metric].item()
        if score > min(self._scores[: -self._after], default=math.inf):
            for optimizer in trainer.optimizers:
                _begin(optimizer)
        self._scores.append(score)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        means = _means(trainer)
        names = dict(pl_module.named_parameters(remove_duplicate=False))
        checkpoint[_TRAINED] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: means.get(names.get(name), value) for name, value in checkpoint["state_dict"].items()
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and _TRAINED in checkpoint:
            pl_module.load_state_dict(checkpoint[_TRAINED])

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scores = list(state_dict["scores"])


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Let the mean begin with the next step, where it has not begun."""
    for group in optimizer.param_groups:
        # A parameter without a gradient has no state.
        steps = [float(optimizer.state[p]["step"]) for p in group["params"] if p in optimizer.state]
        if steps and math.isinf(group["t0"]):
            group["t0"] = max(steps) - 1  # `ASGD` weighs each step by its number as of the step before


def _means(trainer: Trainer) -> dict[Tensor | None, Tensor]:
    """The mean of each parameter that has one."""
    return {
        parameter: state["ax"]
        for optimizer in trainer.optimizers
        for parameter, state in optimizer.state.items()
        if "ax" in state
    }


@torch.no_grad()
def _exchange(trainer: Trainer) -> None:
    """Put the means in the weights' place, and the weights in the means'."""
    for parameter, mean in _means(trainer).items():
        assert parameter is not None
        kept = parameter.clone()
        parameter.copy_(mean)
        mean.copy_(kept)
