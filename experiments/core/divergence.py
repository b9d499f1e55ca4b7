"""Whether a run diverged, and when."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


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
