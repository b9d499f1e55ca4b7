"""The tasks that sentence vectors are tried on, read from the published files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.core.errors import ExperimentError
from experiments.transfer.bigram_shift import bigram_shift
from experiments.transfer.evaluation import (
    FOLDS,
    Array,
    Score,
    Vectors,
    accuracy,
    cross_validated,
    f1,
    paired,
    rated,
    tested,
)
from experiments.transfer.files import read_lines


class Examples(NamedTuple):
    """Sentences or pairs of them, and what is asked about each."""

    sentences: tuple[list[str], ...]  # one list, or two for pairs
    answers: Array  # (N,) labels or ratings


class Transfer(ABC):
    """A task: its examples, and how good vectors are for it."""

    def __init__(self, **parts: Examples) -> None:
        self.parts = parts

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of examples of each part."""
        return tuple(len(part.answers) for part in self.parts.values())

    @abstractmethod
    def scores(self, vectors: Vectors) -> list[Score]:
        """The metrics."""


class Classification(Transfer):
    """Labels of sentences, by nested cross-validation."""

    def scores(self, vectors: Vectors) -> list[Score]:
        [[sentences], labels] = self.parts["all"]
        return cross_validated(vectors(sentences), labels)


class TestedClassification(Transfer):
    """Labels of sentences, with a test of its own."""

    def scores(self, vectors: Vectors) -> list[Score]:
        train, test = ((vectors(part.sentences[0]), part.answers) for part in self.parts.values())
        return tested(train, test, vectors.dimensions, {"accuracy": accuracy})


class Paraphrases(Transfer):
    """Whether two sentences say the same, with a test of its own."""

    def scores(self, vectors: Vectors) -> list[Score]:
        train, test = ((paired(*map(vectors, part.sentences)), part.answers) for part in self.parts.values())
        return tested(train, test, vectors.dimensions, {"accuracy": accuracy, "F1": f1})


class Relatedness(Transfer):
    """How related two sentences are, from 1 to 5."""

    def scores(self, vectors: Vectors) -> list[Score]:
        features = {name: paired(*map(vectors, part.sentences)) for name, part in self.parts.items()}
        return rated(features, {name: part.answers for name, part in self.parts.items()}, vectors.dimensions)


class Reader(NamedTuple):
    """How a task is read from a folder, and how many examples its published parts have."""

    read: Callable[[Path], Transfer]
    sizes: tuple[int, ...] = ()


def _labelled(**lines: Sequence[str]) -> Examples:
    """The lines that are not empty, with 1 for those called `yes`, and 0 for those called `no`."""
    sentences = {label: [line for line in lines[label] if line] for label in ("no", "yes")}
    return Examples(
        (sentences["yes"] + sentences["no"],),
        np.array([1] * len(sentences["yes"]) + [0] * len(sentences["no"])),
    )


def _two_files(
    yes: str | tuple[str, ...], no: str | tuple[str, ...], archive: str | None = None
) -> Callable[[Path], Transfer]:
    """Of a task whose two classes are a file each, a sentence in a line."""

    def read(root: Path) -> Transfer:
        return Classification(
            all=_labelled(yes=read_lines(root, yes, archive).lines, no=read_lines(root, no, archive).lines)
        )

    return read


def _sick(root: Path) -> Transfer:
    names = {"train": "SICK_train.txt", "trial": "SICK_trial.txt", "test": "SICK_test_annotated.txt"}
    columns = ("sentence_A", "sentence_B", "relatedness_score")
    parts = {}
    for part, name in names.items():
        lines, source = read_lines(root, name)
        header = lines[0].split("\t")
        if missing := [column for column in columns if column not in header]:
            raise ExperimentError(f"{source}: its first line names no {missing[0]}, expected SICK's columns.")
        places = [header.index(column) for column in columns]
        rows = [[cells[place] for place in places] for cells in _rows(lines, source, len(header), "as its first line")]
        ratings = [_rating(cells[2], source, i) for i, cells in enumerate(rows)]
        parts[part] = Examples(([cells[0] for cells in rows], [cells[1] for cells in rows]), np.array(ratings))
    return Relatedness(**parts)


def _msrp(root: Path) -> Transfer:
    parts = {}
    for part in ("train", "test"):
        lines, source = read_lines(root, f"msr_paraphrase_{part}.txt")
        rows = _rows(lines, source, 5, "(Quality, two numbers and two sentences)")
        for i, cells in enumerate(rows):
            if cells[0] not in ("0", "1"):
                raise ExperimentError(f"{source}, line {i + 2}: got {cells[0]!r}, expected 0 or 1.")
        answers = np.array([int(cells[0]) for cells in rows])
        parts[part] = Examples(([cells[3] for cells in rows], [cells[4] for cells in rows]), answers)
    return Paraphrases(**parts)


def _trec(root: Path) -> Transfer:
    classes: dict[str, int] = {}
    parts = {}
    for part, name in {"train": "train_5500.label", "test": "TREC_10.label"}.items():
        lines, source = read_lines(root, name)
        questions, answers = [], []
        for i, line in enumerate(lines):
            label, space, question = line.partition(" ")
            coarse, colon, _ = label.partition(":")
            if not (space and colon) or (part == "test" and coarse not in classes):
                raise ExperimentError(f"{source}, line {i + 1}: got {line[:40]!r}, expected CLASS:kind QUESTION.")
            questions.append(question)
            answers.append(classes.setdefault(coarse, len(classes)))
        parts[part] = Examples((questions,), np.array(answers))
    return TestedClassification(**parts)


def _rows(lines: Sequence[str], source: str, columns: int, what: str) -> list[list[str]]:
    """The cells of each line but the first."""
    rows = [line.split("\t") for line in lines[1:]]
    if not rows:
        raise ExperimentError(f"{source}: no examples, expected some below its first line.")
    for i, cells in enumerate(rows):
        if len(cells) != columns:
            raise ExperimentError(
                f"{source}, line {i + 2}: {len(cells)} columns between tabs, expected {columns} {what}."
            )
    return rows


def _rating(given: str, source: str, row: int) -> float:
    try:
        rating = float(given)
    except ValueError:
        rating = 0
    if not 1 <= rating <= 5:
        raise ExperimentError(f"{source}, line {row + 2}: got the rating {given!r}, expected a number from 1 to 5.")
    return rating


_PLOTS, _QUOTES = ("plot.tok.gt9.5000", "subj.objective"), ("quote.tok.gt9.5000", "subj.subjective")
READERS: Mapping[str, Reader] = {
    "sick": Reader(_sick, (4500, 500, 4927)),
    "msrp": Reader(_msrp, (4076, 1725)),
    "mr": Reader(_two_files("rt-polarity.pos", "rt-polarity.neg", "sentence_polarity.zip"), (10662,)),
    "cr": Reader(_two_files("custrev.pos", "custrev.neg")),
    "subj": Reader(_two_files(_QUOTES, _PLOTS, "subjectivity.zip"), (10000,)),
    "mpqa": Reader(_two_files("mpqa.pos", "mpqa.neg")),
    "trec": Reader(_trec, (5452, 500)),
}
TASKS = (*READERS, "bshift")


def read_task(name: str, root: Path, text: Path) -> Transfer:
    """The task of this name, one of `TASKS`: from files below `root`, and BShift from `text`.

    Raises ExperimentError for files that are missing or wrong, and for too few examples of a class.
    """
    if name == "bshift":
        sentences, labels = bigram_shift(text)
        task: Transfer = Classification(all=Examples((sentences,), np.array(labels, dtype=int)))
    else:
        task = READERS[name].read(root)
    if not isinstance(task, Relatedness):
        labels = next(iter(task.parts.values())).answers
        counts = np.bincount(labels, minlength=2)
        if counts.min() < FOLDS:
            raise ExperimentError(
                f"{name}: {counts.min()} examples of a class, expected at least {FOLDS}: one in each fold."
            )
    return task


def published_sizes(name: str) -> tuple[int, ...]:
    """The numbers of examples in the published parts; none where versions differ."""
    return READERS[name].sizes if name in READERS else ()
