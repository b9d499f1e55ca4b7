"""Exact means over all that an evaluation saw, in every process."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import SumMetric


class Mean(NamedTuple):
    """A mean and what it is over: symbols, examples, episodes. A batch of nothing has the weight 0."""

    value: Tensor  # ()
    weight: int


class StreamMeans:
    """The means by name of all batches since the last `compute`, each by its weight: exact for any cut into batches.

    Every process must see the same names, since their sums are exchanged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[SumMetric, SumMetric]] = {}  # of value · weight, and of the weights

    def update(self, means: Mapping[str, Mean]) -> None:
        """Take in a batch."""
        for name, (value, weight) in means.items():
            if name not in self._sums:
                # Not a MeanMetric: it leaves out what is no number, or, told not to, the weights.
                total, weights = (SumMetric(nan_strategy="disable").to(value.device) for _ in range(2))
                self._sums[name] = total.set_dtype(torch.float64), weights.set_dtype(torch.float64)
            total, weights = self._sums[name]
            # A mean over nothing may be NaN, which no weight would take away.
            total.update(value.double() * weight if weight else 0.0)
            weights.update(weight)

    def compute(self) -> dict[str, Tensor]:
        """The means of all batches, over all processes; it starts anew."""
        means = {}
        for name, (total, weights) in self._sums.items():
            means[name] = (total.compute() / weights.compute()).float()
            total.reset()
            weights.reset()
        return means
