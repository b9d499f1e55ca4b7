"""Loaders of drawn batches: an endless stream to train on, resumable anywhere, and fixed sets to evaluate on."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, Self

import torch

from experiments.core.errors import ExperimentError


class Batch(Protocol):
    """What is drawn: of tasks, or of examples."""

    def share(self, rank: int, processes: int, /) -> Self:
        """The part of one process among those that share the batch."""
        ...


Draw = Callable[[int, torch.Generator], Batch]  # the batch of an index


def generator_of(
    index: int,
    *stream: object,  # what names a stream of random numbers
) -> torch.Generator:
    """The generator of one batch of a stream: it does not depend on what was drawn before."""
    digest = hashlib.blake2b(repr(stream).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed((int.from_bytes(digest, "little") + index) % 2**32)


class TrainingBatches:
    """New batches, `epoch` of them to a pass.

    Batch i of all passes is drawn from a generator of its own, made of the seed and i. So a run that goes on needs to
    know i alone, by Lightning's protocol for resuming within an epoch: see `Windows`, and there for `resume_at`.

    Of several processes each has its share of every batch: theirs are different ones, and together those that one
    process would have.

    Args:
        draw: the batch of an index, from a generator.
        epoch: batches in a pass.
        seed: of all batches; a loaded state brings its own.
        position: gives the pass under way and its first batch, asked when that is drawn; None counts the passes.
        rank, processes: this process among those that train together.
    """

    def __init__(
        self,
        draw: Draw,
        epoch: int,
        seed: int,
        position: Callable[[], tuple[int, int]] | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._draw, self._epoch, self.seed = draw, epoch, seed
        self._ask, self._rank, self._processes = position, rank, processes
        self._next = 0  # batch of all passes

    def __len__(self) -> int:
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        first = self._next
        if self._ask is not None:
            number, done = self._ask()
            first = number * self._epoch + done
        for index in range(first, (first // self._epoch + 1) * self._epoch):
            self._next = index + 1
            batch = self._draw(index, generator_of(index, "train", self.seed))
            yield batch.share(self._rank, self._processes)

    def state_dict(self) -> dict[str, int]:
        """The next batch, and the numbers that give it its meaning."""
        return {"next": self._next, "epoch": self._epoch, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next pass go on after the saved batch. Raises ExperimentError where the epochs differ."""
        if state["epoch"] != self._epoch:
            raise ExperimentError(
                f"The checkpoint was saved with {state['epoch']} batches in an epoch, got {self._epoch}. "
                "Resume with the same data settings."
            )
        self._next, self.seed = state["next"], state["seed"]


class FixedBatches:
    """The same batches at every pass: those of several sets, one set after the other.

    Args:
        draws: by the sets' names, the batch of an index, from a generator.
        counts: by the same names, how many batches a set has.
        stream: what names their random numbers.
        rank, processes: this process among those that evaluate together.
    """

    def __init__(
        self,
        draws: Mapping[str, Draw],
        counts: Mapping[str, int],
        stream: tuple[object, ...],
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._draws, self._counts, self._stream = draws, counts, stream
        self._rank, self._processes = rank, processes

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __iter__(self) -> Iterator[Batch]:
        for name, draw in self._draws.items():
            for index in range(self._counts[name]):
                batch = draw(index, generator_of(index, *self._stream, name))
                yield batch.share(self._rank, self._processes)
