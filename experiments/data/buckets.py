"""Examples of unlike lengths, in batches of like ones."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.core.task import Data
from experiments.data.batch_streams import FixedBatches, TrainingBatches, generator_of

# Batches in a bucket: with more, the batches of an epoch are less like those of the one before, and padded more.
_BATCHES_IN_BUCKET = 4


class Buckets:
    """Examples of like lengths in buckets, from which batches are made.

    A batch of so many steps is as many examples of a bucket as fit when padded to the bucket's longest, at least one.
    One of so many examples has one more where this would be left alone: statistics of a batch want two.
    Every epoch has as many batches, whatever it shuffles.

    Args:
        lengths: of the examples.
        size: of a batch: steps, padding included, or examples; of these the last batch may have fewer, or one more.
        unit: which.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        size: int,
        unit: Literal["steps", "examples"] = "steps",
    ) -> None:
        order = torch.as_tensor(lengths).argsort(descending=True, stable=True)
        if unit == "examples":
            least = min(2, size)
            self._buckets = list(order.split(_parts(len(order), size * _BATCHES_IN_BUCKET, least)))
            self._sizes = [_parts(len(bucket), size, least) for bucket in self._buckets]
        else:
            count = max(1, round(int(sum(lengths)) / (size * _BATCHES_IN_BUCKET)))
            self._buckets = [bucket for bucket in order.tensor_split(count) if len(bucket)]
            self._sizes = [_parts(len(bucket), max(1, size // int(lengths[bucket[0]]))) for bucket in self._buckets]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(map(len, self._sizes))

    def batches(self, generator: torch.Generator | None = None) -> list[list[int]]:
        """The examples of each batch of an epoch: shuffled within their buckets, and the batches too, or in order."""
        batches = []
        for bucket, sizes in zip(self._buckets, self._sizes, strict=True):
            shuffled = bucket if generator is None else bucket[torch.randperm(len(bucket), generator=generator)]
            batches += [batch.tolist() for batch in shuffled.split(sizes)]
        if generator is None:
            return batches
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def _parts(count: int, size: int, least: int = 1) -> list[int]:
    """So many in parts of a size and what is left, which goes to the last part where it is fewer than the least."""
    sizes = [min(size, count - first) for first in range(0, count, size)]
    if len(sizes) > 1 and sizes[-1] < least:
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes


class BucketedData(Data):
    """Data in batches of like lengths, for one process.

    A subclass gives `_buckets` and `_batch`, and reads in `setup` after this class's.

    Args:
        seed: of the order in training; None takes the run's.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    @abstractmethod
    def _buckets(self, split: str) -> Buckets:
        """Those of "train", "valid" or "test"."""

    @abstractmethod
    def _batch(self, split: str, chosen: Sequence[int], generator: torch.Generator) -> Any:
        """The examples of these numbers as one batch; what is random in it is drawn from the generator."""

    def setup(self, stage: str | None = None) -> None:
        """Take the run's seed. Raises ExperimentError for several processes."""
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ExperimentError(
                f"{type(self).__name__}: got {self.trainer.world_size} processes, expected one: batches of like "
                "lengths are not shared out. Leave --trainer.devices out."
            )
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**32

    def train_dataloader(self) -> TrainingBatches:
        """Batches in an order that is new in every epoch, resumable within it."""
        buckets = self._buckets("train")
        orders: dict[int, list[list[int]]] = {}  # of the epoch under way

        def draw(index: int, generator: torch.Generator) -> Any:
            epoch, batch = divmod(index, len(buckets))
            if epoch not in orders:
                orders.clear()
                orders[epoch] = buckets.batches(generator_of(epoch, "order", batches.seed))
            return self._batch("train", orders[epoch][batch], generator)

        assert self.seed is not None
        position = None if self.trainer is None else self._position
        batches = TrainingBatches(draw, len(buckets), self.seed, position)
        return batches

    def val_dataloader(self) -> FixedBatches:
        """The validation's examples, the longest first."""
        return self._fixed("valid")

    def test_dataloader(self) -> FixedBatches:
        """The test's examples, the longest first."""
        return self._fixed("test")

    def _fixed(self, split: str) -> FixedBatches:
        batches = self._buckets(split).batches()
        draws = {split: lambda index, generator: self._batch(split, batches[index], generator)}
        return FixedBatches(draws, {split: len(batches)}, (split,))
