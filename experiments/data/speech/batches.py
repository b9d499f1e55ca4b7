"""Batches of utterances of like lengths."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Batches in a bucket: with more, the batches of an epoch are less like those of the one before, and padded more.
_BATCHES_IN_BUCKET = 4


class Utterance(NamedTuple):
    """What was said once."""

    name: str
    features: Tensor  # (T, X)
    labels: list[int]
    text: str


class Batch(NamedTuple):
    """B utterances, the longest first."""

    xs: Tensor  # (T, B, X), padded with 0
    lengths: Tensor  # (B,) int64
    labels: Tensor  # (B, L) int64, padded with 0
    label_lengths: Tensor  # (B,) int64
    texts: tuple[str, ...]
    names: tuple[str, ...]

    def share(self, rank: int, processes: int) -> "Batch":
        """The whole: one process alone trains."""
        assert processes == 1
        return self


def collated(utterances: Sequence[Utterance]) -> Batch:
    """The utterances as one batch."""
    utterances = sorted(utterances, key=lambda one: -len(one.features))
    return Batch(
        pad_sequence([one.features for one in utterances]),
        torch.tensor([len(one.features) for one in utterances]),
        pad_sequence([torch.tensor(one.labels) for one in utterances], batch_first=True),
        torch.tensor([len(one.labels) for one in utterances]),
        tuple(one.text for one in utterances),
        tuple(one.name for one in utterances),
    )


class Buckets:
    """Utterances of like lengths in buckets, from which batches of at most so many frames are made.

    A batch is as many utterances of a bucket as fit when padded to the bucket's longest, at least one. So every epoch
    has as many batches, whatever it shuffles.

    Args:
        lengths: of the utterances.
        frames: in a batch, padding included.
    """

    def __init__(self, lengths: Sequence[int], frames: int) -> None:
        order = torch.tensor(lengths).argsort(descending=True, stable=True)
        count = max(1, round(sum(lengths) / (frames * _BATCHES_IN_BUCKET)))
        self._buckets = [bucket for bucket in order.tensor_split(count) if len(bucket)]
        self._sizes = [max(1, frames // lengths[bucket[0]]) for bucket in self._buckets]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(-(-len(bucket) // size) for bucket, size in zip(self._buckets, self._sizes, strict=True))

    def batches(self, generator: torch.Generator | None = None) -> list[list[int]]:
        """The utterances of each batch of an epoch: shuffled within their buckets, and the batches too, or in order."""
        batches = []
        for bucket, size in zip(self._buckets, self._sizes, strict=True):
            shuffled = bucket if generator is None else bucket[torch.randperm(len(bucket), generator=generator)]
            batches += [batch.tolist() for batch in shuffled.split(size)]
        if generator is None:
            return batches
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
