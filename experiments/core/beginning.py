"""The moment at which a run begins to change its files."""

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer


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
