"""Batches of tasks: a function's points, shared out into a context and targets."""

from typing import NamedTuple

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError


class Ceiling(NamedTuple):
    """The log-likelihood of the process that the functions are from, of each task, per target."""

    marginal: Tensor  # (B,): each target by itself
    joint: Tensor  # (B,): all targets of a task together


class Batch(NamedTuple):
    """B tasks. Where they differ in size, the masks are true at the points that are there."""

    context_x: Tensor  # (B, C, X)
    context_y: Tensor  # (B, C, Y)
    context_mask: Tensor | None  # (B, C) bool
    target_x: Tensor  # (B, N, X)
    target_y: Tensor  # (B, N, Y)
    target_mask: Tensor | None  # (B, N) bool
    name: str  # of the set that the tasks are from
    index: int  # of the batch in its set
    ceiling: Ceiling | None = None
    has_own_sizes: bool = False  # whether the sizes were drawn for each task

    def share(self, rank: int, processes: int) -> "Batch":
        """The tasks of one process among several."""

        def mine(tensor: Tensor) -> Tensor:
            return tensor[rank::processes]

        ceiling = None if self.ceiling is None else Ceiling(*map(mine, self.ceiling))
        tensors = {name: mine(value) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**tensors, ceiling=ceiling)


class Sizes(NamedTuple):
    """How many points a task's context and its targets have: uniform between two numbers, these included.

    `targets` None: all the others that the function has. `most` bounds the sum, by fewer targets.
    """

    context: tuple[int, int]
    targets: tuple[int, int] | None
    most: int | None = None

    def draw(
        self,
        available: Tensor,  # (B,) int64: how many points each function has
        generator: torch.Generator,
        is_ragged: bool,  # sizes of each task, instead of one for all of them
    ) -> tuple[Tensor, Tensor]:  # (B,) each
        """The sizes of B tasks: of their contexts, and of their targets."""
        count = len(available)
        least = 1 if self.targets is None else self.targets[0]
        contexts = torch.minimum(_uniform(*self.context, count, generator, is_ragged), available - least)
        if self.targets is None:
            return contexts, available - contexts
        highest = torch.full_like(contexts, self.targets[1])
        if self.most is not None:
            highest = torch.minimum(highest, self.most - contexts)
        drawn = _uniform(0, 2**24 - 1, count, generator, is_ragged)
        targets = least + (drawn * (highest - least + 1) >> 24)
        return contexts, torch.minimum(targets, available - contexts)

    @property
    def highest(self) -> int:
        """The most points that a task can have, where `targets` says how many."""
        assert self.targets is not None
        whole = self.context[1] + self.targets[1]
        return whole if self.most is None else min(whole, self.most)

    def check(self, prefix: str) -> None:
        """Raise ExperimentError unless the sizes make sense. The prefix is that of the settings' names."""
        low, high = self.context
        if not 0 <= low <= high:
            raise ExperimentError(f"--data.{prefix}context: got {low} to {high}, expected 0 ≤ lowest ≤ highest.")
        if self.targets is None:
            return
        low, high = self.targets
        if not 1 <= low <= high:
            raise ExperimentError(f"--data.{prefix}targets: got {low} to {high}, expected 1 ≤ lowest ≤ highest.")
        if self.most is not None and self.context[1] + low > self.most:
            raise ExperimentError(
                f"--data.{prefix}most: got {self.most}, expected at least {self.context[1] + low}: the largest context "
                "and the fewest targets."
            )


def shared_out(
    x: Tensor,  # (B, P, X)
    y: Tensor,  # (B, P, Y)
    contexts: Tensor,  # (B,) int64
    targets: Tensor,  # (B,) int64
    name: str,
    index: int,
) -> Batch:
    """The tasks whose contexts are the first points, and whose targets follow them."""
    (c, n), is_ragged = (int(contexts.max()), int(targets.max())), bool((contexts != contexts[0]).any())
    if not is_ragged and not bool((targets != targets[0]).any()):
        return Batch(x[:, :c], y[:, :c], None, x[:, c : c + n], y[:, c : c + n], None, name, index)
    places = contexts.unsqueeze(-1) + torch.arange(n)
    of_targets = places.clamp(max=x.shape[1] - 1).unsqueeze(-1)
    target_x, target_y = (values.gather(1, of_targets.expand(-1, -1, values.shape[-1])) for values in (x, y))
    masks = (torch.arange(size) < counts.unsqueeze(-1) for size, counts in ((c, contexts), (n, targets)))
    context_mask, target_mask = masks
    return Batch(x[:, :c], y[:, :c], context_mask, target_x, target_y, target_mask, name, index)


def _uniform(low: int, high: int, count: int, generator: torch.Generator, is_ragged: bool) -> Tensor:
    """Whole numbers from `low` to `high`: of each task, or one for all."""
    return torch.randint(low, high + 1, (count if is_ragged else 1,), generator=generator).expand(count)
