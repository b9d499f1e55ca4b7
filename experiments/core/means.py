"""Exact means over all that an evaluation saw, in every process."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class Mean(NamedTuple):
    """A mean and what it is over: symbols, examples, episodes. A batch of nothing has the weight 0."""

    value: Tensor  # ()
    weight: int


class StreamMeans:
    """The means by name of all batches since the last `compute`, each by its weight: exact for any cut into batches.

    Every process must see the same names, since their sums are exchanged.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, MeanMetric] = {}

    def update(self, means: Mapping[str, Mean]) -> None:
        """Take in a batch."""
        for name, (value, weight) in means.items():
            if name not in self._metrics:
                self._metrics[name] = MeanMetric().to(value.device)
            # A mean over nothing may be NaN, which no weight would take away.
            self._metrics[name].update(value if weight else torch.zeros_like(value), weight)

    def compute(self) -> dict[str, Tensor]:
        """The means of all batches, over all processes; it starts anew."""
        means = {name: metric.compute() for name, metric in self._metrics.items()}
        for metric in self._metrics.values():
            metric.reset()
        return means
