"""Word vectors that somebody has, in the text format of word2vec or of GloVe."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.core.errors import ExperimentError


class WordVectors(NamedTuple):
    """N words, and a vector of each."""

    rows: dict[str, int]  # by word
    vectors: np.ndarray  # (N, D) float32


def read_word_vectors(path: Path) -> WordVectors:
    """The vectors of a text file: a word and its numbers a line, and in word2vec's format N and D before them.

    Words are in small letters afterwards; of those that are the same then the first counts, which is the most frequent
    one in the published files. GloVe's words may have spaces in them.
    Raises ExperimentError for a file that is none, naming the line.
    """
    rows: dict[str, int] = {}
    vectors: list[np.ndarray] = []
    size = announced = None
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                fields = line.rstrip().split(" ")
                if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
                    announced, size = map(int, fields)
                    continue
                size = size or len(fields) - 1
                word = " ".join(fields[:-size]).lower()
                if not word or size < 1:
                    raise ExperimentError(
                        f"{path}, line {number}: got {len(fields)} fields, expected a word and {max(size, 1)} numbers."
                    )
                if word not in rows:
                    vectors.append(_numbers(fields[-size:], f"{path}, line {number}"))
                    rows[word] = len(rows)
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ExperimentError(
            f"{path}: no text in UTF-8 ({error}), expected word vectors in the text format of word2vec or GloVe."
        ) from error
    if not vectors:
        raise ExperimentError(f"{path}: there are no word vectors in the file.")
    if announced is not None and number - 1 < announced:
        raise ExperimentError(f"{path}: {number - 1} words, expected {announced} by its first line: it is truncated.")
    return WordVectors(rows, np.stack(vectors))


def _numbers(fields: list[str], where: str) -> np.ndarray:
    try:
        numbers = np.array(fields, np.float32)
    except ValueError as error:
        raise ExperimentError(f"{where}: expected {len(fields)} numbers after the word: {error}.") from error
    if not np.isfinite(numbers).all():
        raise ExperimentError(f"{where}: a number is not finite.")
    return numbers
