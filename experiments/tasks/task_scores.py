"""Scores of many tasks: their means with intervals, in all and by context size."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.core.intervals import Estimate, estimated


class Scores(NamedTuple):
    """What the tasks of a set scored.

    Tasks that share the sizes of their batch are alike, so the intervals take such batches for independent, not tasks.
    """

    batch: Tensor  # (N,) int64: whose sizes the task has; negative: its own
    context: Tensor  # (N,) int64: how many points it has
    values: Mapping[str, Tensor]  # (N,) each, float64

    def summary(self) -> dict[str, float]:
        """The means by name, and the half widths as NAME_half_width where there are any."""
        summary = {}
        for name in self.values:
            mean, half_width, _ = self.estimate(name)
            summary |= {name: mean} | ({} if half_width is None else {f"{name}_half_width": half_width})
        return summary

    def estimate(self, name: str) -> Estimate:
        """The mean over all tasks. There is no interval of one batch, or of one task."""
        values = self.values[name]
        alone = -1 - torch.arange(len(values))
        _, number = torch.where(self.batch < 0, alone, self.batch).unique(return_inverse=True)
        batches = int(number.max()) + 1
        mean = values.mean()
        sums = torch.zeros(batches, dtype=values.dtype).index_add_(0, number, values - mean)
        deviation = sums.square().sum().sqrt() / len(values)
        factor = math.sqrt(batches / (batches - 1)) if batches > 1 else math.nan
        return estimated(mean.item(), factor * deviation.item(), batches)

    def where(self, low: int, high: float) -> "Scores":
        """The tasks with at least `low` and fewer than `high` context points."""
        kept = (self.context >= low) & (self.context < high)
        return Scores(self.batch[kept], self.context[kept], {name: of[kept] for name, of in self.values.items()})


class TaskScores:
    """Collects the scores of an evaluation, set by set, in one process or several."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Scores]] = {}

    def take(
        self,
        name: str,  # of the set
        batch: int | None,  # None: each task has sizes of its own
        context: Tensor,  # (B,)
        values: Mapping[str, Tensor],  # (B,) each
    ) -> None:
        """Take in a batch."""
        of_tasks = {metric: value.detach().double().cpu() for metric, value in values.items()}
        scores = Scores(torch.full((len(context),), -1 if batch is None else batch), context.cpu(), of_tasks)
        self._parts.setdefault(name, []).append(scores)

    def taken(self) -> dict[str, Scores]:
        """All since the last call, by set."""
        parts, self._parts = self._parts, {}
        return {name: _joined(of_set) for name, of_set in parts.items()}

    @staticmethod
    def collected(of_processes: Iterable[Mapping[str, Scores]]) -> dict[str, Scores]:
        """What the processes took, together, by set."""
        by_set: dict[str, list[Scores]] = {}
        for taken in of_processes:
            for name, scores in taken.items():
                by_set.setdefault(name, []).append(scores)
        return {name: _joined(parts) for name, parts in by_set.items()}


def table(name: str, scores: Scores, buckets: Sequence[int]) -> str:
    """The means by context size as text, a row for each bucket that has tasks."""
    edges = sorted({*buckets, 0})
    rows = [["context", "tasks", *scores.values]]
    for low, high in [*zip(edges, [*edges[1:], math.inf], strict=True), (0, math.inf)]:
        of_bucket = scores.where(low, high)
        if not len(of_bucket.context):
            continue
        least, most = int(of_bucket.context.min()), int(of_bucket.context.max())
        shown = [of_bucket.estimate(metric).with_half_width("{:.3f}".format) for metric in scores.values]
        rows.append([f"{least}–{most}", str(len(of_bucket.context)), *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([name, *lines])


def _joined(parts: Sequence[Scores]) -> Scores:
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    return Scores(torch.cat([p.batch for p in parts]), torch.cat([p.context for p in parts]), values)
