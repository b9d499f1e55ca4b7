"""Batches of utterances of like lengths."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


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
