"""The state of torch's random generators: a run that goes on draws what an uninterrupted one would."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from experiments.core.processes import gathered


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


def _state() -> dict[str, Any]:
    """The states of the CPU's generator and of every CUDA device's, as byte tensors."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_state(state: dict[str, Any]) -> None:
    """Put the generators into a state that `_state` gave; devices that are not here are passed over."""
    torch.set_rng_state(state["cpu"].cpu())
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state.cpu(), device)
