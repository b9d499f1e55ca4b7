"""Sentences with those beside them, from a stream of words."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Sentences(NamedTuple):
    """B sentences, each with its `<eos>`."""

    words: Tensor  # (T, B) int64, padded with 0
    lengths: Tensor  # (B,) int64


class Batch(NamedTuple):
    """B sentences, each with the one before and the one after it."""

    sentences: Sentences
    previous: Sentences
    following: Sentences

    def share(self, rank: int, processes: int) -> "Batch":
        """The whole: one process alone trains."""
        assert processes == 1
        return self


class Triples:
    """The triples of neighbouring sentences in a stream of words.

    Args:
        stream: (1 + N,), `<eos>`, then sentences, each with `<eos>` after it; between documents there is an empty one.
        eos: the number of `<eos>`.
        max_length: words of a sentence at most; triples with a longer one are left out.
    """

    def __init__(self, stream: Tensor, eos: int, max_length: int) -> None:
        self._stream = stream
        self._ends = np.flatnonzero(stream.numpy() == eos)
        lengths = np.diff(self._ends) - 1
        fits = (lengths > 0) & (lengths <= max_length)
        self._middles = 1 + np.flatnonzero(fits[:-2] & fits[1:-1] & fits[2:])

    def __len__(self) -> int:
        return len(self._middles)

    def order(self) -> np.ndarray:  # (N,)
        """Keys that sort the triples by the length of their longest sentence, and then by that of the middle one."""
        lengths = np.stack([self._ends[self._middles + k + 1] - self._ends[self._middles + k] for k in (-1, 0, 1)])
        return lengths.max(0) * (lengths.max() + 1) + lengths[1]

    def batch(self, chosen: Sequence[int]) -> Batch:
        """The triples of these numbers."""
        middles = self._middles[list(chosen)]
        return Batch(*(self._padded(middles + beside) for beside in (0, -1, 1)))

    def _padded(self, numbers: np.ndarray) -> Sentences:
        begins, ends = self._ends[numbers] + 1, self._ends[numbers + 1] + 1  # with its `<eos>`
        rows = [self._stream[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
        return Sentences(pad_sequence(rows).long(), torch.from_numpy(ends - begins))
