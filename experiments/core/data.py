"""What data are: the frame trains on any of them, and knows none."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning import Trainer


class Data(ABC):
    """Batches to train on, to validate with and to test with.

    One without a test gives no `test_dataloader`. A loader that has `state_dict` and `load_state_dict` is asked for its
    place by every checkpoint, so that a run goes on within an epoch.
    """

    trainer: "Trainer | None" = None  # who trains on them; it knows the epoch, and how many processes there are

    def prepare_data(self) -> None:  # noqa: B027
        """Download, in one process of several."""

    def setup(self, stage: str | None = None) -> None:  # noqa: B027
        """Read, in every process. It may be called more than once."""

    @abstractmethod
    def train_dataloader(self) -> Iterable[Any]:
        """The batches of an epoch."""

    @abstractmethod
    def val_dataloader(self) -> Iterable[Any]:
        """The batches of a validation."""

    def _processes(self) -> tuple[int, int]:
        """This process's rank, and how many train together."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _position(self) -> tuple[int, int]:
        """The epoch under way and its first batch to give: Lightning's counts, right once that epoch has begun."""
        assert self.trainer is not None
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
