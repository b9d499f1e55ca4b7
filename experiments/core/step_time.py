"""How long a step of training takes."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer


class StepTime(Callback):
    """Counts the time between the ends of training steps; validations and a process's first step are left out.

    The first step compiles: its time says nothing of the others'.
    """

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0
        self._last: tuple[float, int] | None = None  # when the last batch ended, and the steps done by then

    @property
    def mean(self) -> float | None:
        """Seconds per step; None where there were too few to tell."""
        return self._seconds / self._steps if self._steps else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._last is not None:
            self._seconds += now - self._last[0]
            self._steps += trainer.global_step - self._last[1]
        self._last = now, trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is not None:
            self._last = time.monotonic(), self._last[1]

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._steps = state_dict["seconds"], state_dict["steps"]
