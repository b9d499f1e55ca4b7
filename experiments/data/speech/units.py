"""The labels of a recogniser: characters, phones or whole words."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.core.errors import ExperimentError

Kind = Literal["characters", "phones", "words"]
Lexicon = Mapping[str, Sequence[Sequence[str]]]  # the pronunciations of each word, as symbols

BLANK = 0  # its label


class Units:
    """Label 0 is the blank of CTC, and labels from 1 on are the symbols.

    Args:
        kind: what a symbol is. Of characters, the space between words is one too.
        symbols: in the order of their labels.
        lexicon: each known word as sequences of symbols, of which the first is the one to train with.
    """

    def __init__(self, kind: Kind, symbols: Sequence[str], lexicon: Lexicon) -> None:
        self.kind, self.symbols = kind, list(symbols)
        self.lexicon = {word: [list(one) for one in pronunciations] for word, pronunciations in lexicon.items()}
        self._labels = {symbol: label for label, symbol in enumerate(self.symbols, start=BLANK + 1)}

    @classmethod
    def of(cls, kind: Kind, transcripts: Iterable[str], lexicon: Lexicon | None) -> "Units":
        """Those of the training's transcripts and, where it is given, of a lexicon of phones.

        Raises ExperimentError for phones without a lexicon.
        """
        transcripts = list(transcripts)
        words = sorted({word for text in transcripts for word in text.split()} | set(lexicon or ()))
        if kind == "phones":
            if lexicon is None:
                raise ExperimentError("--data.unit: phones need the words' pronunciations: give --data.lexicon=FILE.")
            phones = {phone for pronunciations in lexicon.values() for one in pronunciations for phone in one}
            return cls(kind, sorted(phones), lexicon)
        if kind == "words":
            return cls(kind, words, {word: [[word]] for word in words})
        return cls(kind, sorted(set().union(*transcripts, *words)), {word: [list(word)] for word in words})

    def __len__(self) -> int:
        """The number of labels V, the blank among them."""
        return len(self.symbols) + 1

    def encode(self, text: str, name: str) -> list[int]:
        """The labels of a transcript.

        Raises ExperimentError with that name for one that is empty or has an unknown symbol or word.
        """
        if self.kind == "characters":
            symbols: Sequence[str] = text
            unknown = set(text) - self._labels.keys()
        else:
            words = text.split()
            unknown = set(words) - self.lexicon.keys()
            symbols = [symbol for word in words if word in self.lexicon for symbol in self.lexicon[word][0]]
        if unknown:
            shown = ", ".join(map(repr, sorted(unknown)[:5]))
            what = "a symbol" if self.kind == "characters" else "a word"
            raise ExperimentError(
                f"{name}: the transcript has {shown}, not {what} of the lexicon or of the training's transcripts. "
                "Correct it, leave it out, or name a --data.lexicon that has it."
            )
        if not symbols:
            raise ExperimentError(f"{name}: the transcript is empty, expected words. Leave such recordings out.")
        return [self._labels[symbol] for symbol in symbols]

    def labels_of(self, word: str) -> list[list[int]]:
        """The pronunciations of a known word, as labels."""
        return [[self._labels[symbol] for symbol in one] for one in self.lexicon[word]]

    def decode(self, labels: Iterable[int]) -> str:
        """The text of labels without blanks; of phones, these with spaces between them."""
        symbols = [self.symbols[label - 1] for label in labels]
        return " ".join("".join(symbols).split() if self.kind == "characters" else symbols)

    def reference(self, text: str) -> str:
        """What `decode` gives where everything is right."""
        return self.decode(self.encode(text, "the reference"))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, of which `from_state` makes the same units."""
        return {"kind": self.kind, "symbols": self.symbols, "lexicon": self.lexicon}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Units":
        return cls(state["kind"], state["symbols"], state["lexicon"])


def one_spaced(text: str) -> str:
    """The text with one space between its words."""
    return " ".join(text.split())


def read_lexicon(path: Path, content: str | None = None) -> dict[str, list[list[str]]]:
    """A pronunciation dictionary: lines of a word and its phones. More pronunciations of it follow as `WORD(2)`.

    Args:
        content: of the file, where it is a part of an archive.

    Raises ExperimentError for a file that cannot be read or has no words, and for a word without phones.
    """
    if content is None:
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExperimentError(f"{path}: no lexicon in UTF-8 ({error}). Give one by --data.lexicon.") from error
    lexicon: dict[str, list[list[str]]] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        word, *phones = line.split() or [""]
        if not word:
            continue
        if not phones:
            raise ExperimentError(f"{path}, line {number}: '{word}' has no phones, expected WORD PHONE PHONE …")
        lexicon.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(phones)
    if not lexicon:
        raise ExperimentError(f"{path}: the lexicon is empty, expected lines of WORD PHONE PHONE …")
    return lexicon
