"""What every memory task gives: sequences, and what is to be answered at their end."""

from typing import NamedTuple

from torch import Tensor


class Recall(NamedTuple):
    """Sequences, and the answers at their last R steps: numbers, or classes."""

    xs: Tensor  # (T, B, X)
    answers: Tensor  # (R, B), floating-point or int64

    def share(self, rank: int, processes: int) -> "Recall":
        """The sequences of one process among several."""
        return Recall(*(stream[:, rank::processes] for stream in self))
