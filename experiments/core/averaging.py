"""The mean of the weights over the last steps of a run."""

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import ASGD

from experiments.core.errors import ExperimentError

_TRAINED = "trained_state_dict"  # in a checkpoint: the weights that training goes on with


class AverageWeights(Callback):
    """Non-monotonically triggered averaging, NT-ASGD, by the averages that torch's `ASGD` keeps.

    The mean of the weights begins at the first validation whose score is worse than the best of all but the `after`
    validations before it. From then on the validations of the run and the weights in checkpoints are those of the
    mean; training goes on with its own weights, which checkpoints hold too.

    Raises: ExperimentError for an `after` below 1, and for another optimizer.
    Source: Merity et al. 2018 (AWD-LSTM), algorithm 1.
    """

    def __init__(self, after: int, metric: str, mode: str) -> None:
        if after < 1:
            raise ExperimentError(f"average_after is {after}, expected at least 1, or null.")
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
