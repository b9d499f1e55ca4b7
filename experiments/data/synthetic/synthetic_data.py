"""What all made data share: an endless stream to train on, and fixed sets to evaluate on."""

from abc import abstractmethod
from typing import Any

import torch

from experiments.core.errors import ExperimentError
from experiments.core.task import Data
from experiments.data.batch_streams import FixedBatches, TrainingBatches


class SyntheticData(Data):
    """Examples drawn from a seed: new ones at every step of training, the same ones at every evaluation.

    The seed decides what is to be learnt, too. A run that goes on has the examples of an uninterrupted one.

    Args:
        batch_size: examples in a batch, of all processes together.
        epoch: batches in a pass.
        eval_examples: in the validation, and as many in the test.
        seed: of all that is drawn; None takes the run's.

    Raises ExperimentError at construction for a size below 1.
    """

    def __init__(
        self,
        batch_size: int,
        epoch: int,
        eval_examples: int,
        seed: int | None,
    ) -> None:
        self.check(batch_size=batch_size, epoch=epoch, eval_examples=eval_examples)
        self.batch_size, self.epoch, self.eval_examples, self.seed = batch_size, epoch, eval_examples, seed

    @abstractmethod
    def learnt(self) -> dict[str, Any]:
        """What a network must know of the data to be built, as plain values; known before `setup`."""

    @abstractmethod
    def draw(self, count: int, split: str, generator: torch.Generator) -> Any:
        """So many examples for "train", "valid" or "test". They have a `share` for each process; see `Pairs`."""

    def held_out(self, first: int, count: int, split: str, generator: torch.Generator) -> Any:
        """An evaluation's examples from that number on: drawn, where the data are not a set of which some are kept."""
        return self.draw(count, split, generator)

    @staticmethod
    def check(**sizes: int) -> None:
        """Raise ExperimentError for one of these settings that is below 1."""
        for name, size in sizes.items():
            if size < 1:
                raise ExperimentError(f"--data.{name}: got {size}, expected at least 1.")

    def setup(self, stage: str | None = None) -> None:
        """Fixes the seed. Raises ExperimentError where a batch cannot be shared out among the processes."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**32
        if self.batch_size % (processes := self._processes()[1]):
            raise ExperimentError(
                f"--data.batch_size: got {self.batch_size} examples for {processes} processes, expected a multiple of "
                f"{processes}, so that each has as many."
            )

    def train_dataloader(self) -> TrainingBatches:
        """Batches of new examples, resumable within an epoch."""
        assert self.seed is not None
        position = None if self.trainer is None else self._position
        return TrainingBatches(
            lambda _, generator: self.draw(self.batch_size, "train", generator),
            self.epoch,
            self.seed,
            position,
            *self._processes(),
        )

    def val_dataloader(self) -> FixedBatches:
        """The validation's examples."""
        return self._fixed("valid")

    def test_dataloader(self) -> FixedBatches:
        """The test's examples."""
        return self._fixed("test")

    def _fixed(self, split: str) -> FixedBatches:
        size = self.batch_size

        def draw(index: int, generator: torch.Generator) -> Any:
            first = index * size
            return self.held_out(first, min(size, self.eval_examples - first), split, generator)

        counts = {split: -(-self.eval_examples // size)}
        return FixedBatches({split: draw}, counts, (split, self.seed), *self._processes())
