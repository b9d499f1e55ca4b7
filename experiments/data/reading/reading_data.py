"""What the data of all readers share: questions on documents, in batches."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch

from experiments.core.errors import ExperimentError
from experiments.data.batch_streams import generator_of
from experiments.data.buckets import BucketedData, Buckets
from experiments.data.reading.questions import Batch, Encoded, Question, collated, renumbered
from experiments.data.reading.wording import Wording, encoded


class ReadingData(BucketedData):
    """Questions on documents, in batches of documents of like lengths.

    A subclass gives `_questions`. Where the answers are markers of entities, these are permuted whenever a question is
    put into a batch: in training anew in every epoch, in evaluation always in the same way.

    Args:
        max_words: of the vocabulary, the most frequent of the training; None: all. Others become `<unk>`.
        min_count: how often a word must stand in the training to be one of them.
        renumber: whether the markers are permuted.
        batch_size: questions in a batch.
        seed: of the order in training; None takes the run's.

    Raises ExperimentError at construction for a setting out of range, and in `setup` for questions that cannot be
    used.
    """

    def __init__(
        self, max_words: int | None, min_count: int, renumber: bool, batch_size: int, seed: int | None
    ) -> None:
        super().__init__(seed)
        for name, value in {"max_words": max_words, "min_count": min_count, "batch_size": batch_size}.items():
            if value is not None and value < 1:
                raise ExperimentError(f"--data.{name}: got {value}, expected at least 1.")
        self.max_words, self.min_count, self.renumber, self.batch_size = max_words, min_count, renumber, batch_size
        self._wording: Wording | None = None
        self._sets: dict[str, list[Encoded]] = {}  # by split

    @abstractmethod
    def _questions(self, split: str) -> Iterable[Question]:
        """Those of "train", "valid" or "test". Raises ExperimentError where they cannot be used."""

    @property
    def wording(self) -> Wording:
        """The words and the answers; available after `setup`."""
        assert self._wording is not None
        return self._wording

    def questions(self, split: str) -> list[Encoded]:
        """Those of "train", "valid" or "test" in numbers; available after `setup`."""
        return self._sets[split]

    def singly(self, split: str, count: int) -> Iterator[Batch]:
        """The first questions of a split, each as a batch of its own."""
        for i in range(min(count, len(self._sets[split]))):
            yield self._batch(split, [i], generator_of(i, "singly", split))

    def setup(self, stage: str | None = None) -> None:
        """Read the questions, once for all stages. Raises ExperimentError where they cannot be used."""
        super().setup(stage)
        if not self._sets:
            self._wording, self._sets = encoded(self._questions, self.max_words, self.min_count)

    def _buckets(self, split: str) -> Buckets:
        return Buckets([len(one.document) for one in self._sets[split]], self.batch_size, "examples")

    def _batch(self, split: str, chosen: Sequence[int], generator: torch.Generator) -> Batch:
        batch = collated([self._sets[split][i] for i in chosen])
        if self.renumber and self.wording.markers:
            return renumbered(batch, self.wording.markers, generator)
        return batch
