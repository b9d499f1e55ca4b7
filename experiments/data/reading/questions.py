"""A question on a document, in words and as numbers, and batches of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PLACEHOLDER = "@placeholder"  # what stands in a query where the answer belongs


class Question(NamedTuple):
    """A question in words, of which `@entity0`, `@entity1`, … are markers of entities."""

    name: str
    document: list[str]
    query: list[str]
    answer: str  # a marker where there are any
    group: str = ""  # whose accuracy is told beside the whole's: a task of bAbI


class Encoded(NamedTuple):
    """The same in numbers."""

    name: str
    document: Tensor  # (T,) int32
    query: Tensor  # (L,) int32
    answer: int
    group: str


class Batch(NamedTuple):
    """B questions, that with the longest document first."""

    documents: Tensor  # (T, B) int64, padded with 0
    lengths: Tensor  # (B,) int64
    queries: Tensor  # (L, B) int64, padded with 0
    query_lengths: Tensor  # (B,) int64
    answers: Tensor  # (B,) int64
    groups: tuple[str, ...]
    names: tuple[str, ...]

    def share(self, rank: int, processes: int) -> "Batch":
        """The whole: one process alone trains."""
        assert processes == 1
        return self


def collated(questions: Sequence[Encoded]) -> Batch:
    """The questions as one batch."""
    questions = sorted(questions, key=lambda one: -len(one.document))
    documents, queries = [one.document for one in questions], [one.query for one in questions]
    return Batch(
        pad_sequence(documents).long(),
        torch.tensor([len(one) for one in documents]),
        pad_sequence(queries).long(),
        torch.tensor([len(one) for one in queries]),
        torch.tensor([one.answer for one in questions]),
        tuple(one.group for one in questions),
        tuple(one.name for one in questions),
    )


def renumbered(
    batch: Batch,
    markers: int,  # E: the words from 1 to E, and the answers, are markers of entities
    generator: torch.Generator,
) -> Batch:
    """The same questions with the markers of each permuted at random, so that a number says nothing of its entity."""
    count = len(batch.names)
    orders = torch.rand(markers, count, generator=generator).argsort(0)  # a permutation for each question

    def marked(words: Tensor) -> Tensor:
        is_marker = (words >= 1) & (words <= markers)
        return torch.where(is_marker, orders.gather(0, (words - 1).clamp(0, markers - 1)) + 1, words)

    answers = orders.gather(0, batch.answers.unsqueeze(0)).squeeze(0)
    return batch._replace(documents=marked(batch.documents), queries=marked(batch.queries), answers=answers)
