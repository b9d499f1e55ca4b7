"""BShift: are two neighbouring words of a sentence swapped? Made from any text."""

import random
from itertools import pairwise
from pathlib import Path

from experiments.core.errors import ExperimentError
from experiments.data.books import book_files, read_book, works
from experiments.data.sentences import sentences_of, words_of
from experiments.data.sentences.tokens import Reading, cut
from experiments.data.text.stream_data import HELD_OUT

_READING = Reading("prose", encoding=None, valid=HELD_OUT, test=HELD_OUT)  # shares as of `Books`
_SHORTEST, _LONGEST = 5, 28  # words, as of Conneau et al. 2018
_MOST = 10_000  # sentences
_SEED = 1234


def bigram_shift(path: Path) -> tuple[list[str], list[int]]:
    """Sentences in small letters, and for each whether two of its words are swapped: half of them, drawn at random.

    They are from the last tenth of each work in a file or a folder, on which `experiments.data.Books` does not train
    by default; at most 10,000, of 5 to 28 words. Of the swapped words neither is punctuation, and they differ.
    Raises ExperimentError for text that cannot be read, or has too few such sentences.
    Source: Conneau et al. 2018, who have 100,000 of one corpus to train on; so no figure of theirs is comparable.
    """
    if not path.exists():
        raise ExperimentError(f"bshift: there is no {path}. Give a text, or a folder of texts, by --data.text.")
    candidates = []
    for file in book_files(path, None):
        for work in works(read_book(file, _READING.encoding)):
            held_out = [text for split, text in cut(work, _READING) if split != "train"]
            candidates += [words_of(sentence) for text in held_out for sentence in sentences_of(text)]
    usable = [words for words in candidates if _SHORTEST <= len(words) <= _LONGEST and _places(words)]
    generator = random.Random(_SEED)
    generator.shuffle(usable)
    chosen = usable[: min(_MOST, len(usable) // 2 * 2)]
    labels = [i % 2 for i in range(len(chosen))]
    return [
        " ".join(_swapped(words, generator) if y else words) for words, y in zip(chosen, labels, strict=True)
    ], labels


def _places(words: list[str]) -> list[int]:
    """Where a word and the next one can be swapped."""
    return [
        i for i, (one, other) in enumerate(pairwise(words)) if one != other and one[0].isalpha() and other[0].isalpha()
    ]


def _swapped(words: list[str], generator: random.Random) -> list[str]:
    i = generator.choice(_places(words))
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
