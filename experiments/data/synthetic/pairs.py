"""Batches of a regression on two streams."""

from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """Two streams, and what they make together."""

    x: Tensor  # (B, X)
    z: Tensor  # (B, Z)
    y: Tensor  # (B, O)

    def share(self, rank: int, processes: int) -> "Pairs":
        """The examples of one process among several."""
        return Pairs(*(stream[rank::processes] for stream in self))
