"""A cloze of novels: which entity is left out of a sentence, from what stands before it.

Derived here from public texts, after the way of Hermann et al. 2015; it is none of theirs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.core.errors import ExperimentError
from experiments.data.books import book_files, check_encoding, read_book, works
from experiments.data.reading.entities import Mention, mentioning, merged, names_in, sentences
from experiments.data.reading.questions import PLACEHOLDER, Question
from experiments.data.reading.reading_data import ReadingData

_PARTS = 20  # of a book, of which every tenth is for validation, and every tenth for the test
_SPLITS = {4: "valid", 9: "test"}  # by a part's number modulo 10; the others are for training
_SHORTEST, _LONGEST = 5, 40  # words of a sentence that is asked
_CANDIDATES = 3  # entities of a document at least: of two, one guess in two is right

Sentence = list[str | Mention]


class NovelCloze(ReadingData):
    """The document is what precedes a sentence; the query is the sentence, with `@placeholder` for one of its entities.

    The entity stands in the document too, which has others. Entities are found by `experiments.data.reading.entities`
    and become markers, drawn anew whenever a question is put into a batch: what is known of Emma from elsewhere does
    not help. All other words are in small letters. Each book is cut into parts, of which one tenth is for validation
    and one tenth for the test; no document reaches across two.

    Args:
        path: a text, or a folder of texts, with those in its folders; `.txt`, or `.zip` of one text.
        books: files in the folder, by their paths in it; None: all.
        length: words of a document at most, whole sentences.
        entities: of a question at most, and so the number of markers.
        encoding: of the texts, by Python's name for it.
        max_words, min_count, renumber, batch_size, seed: see `ReadingData`.
    """

    def __init__(
        self,
        path: str,
        books: Sequence[str] | None = None,
        length: int = 120,
        entities: int = 10,
        encoding: str = "utf-8",
        max_words: int | None = 10_000,
        min_count: int = 2,
        renumber: bool = True,
        batch_size: int = 64,
        seed: int | None = None,
    ) -> None:
        super().__init__(max_words, min_count, renumber, batch_size, seed)
        for name, value, least in (("length", length, 1), ("entities", entities, 2)):
            if value < least:
                raise ExperimentError(f"--data.{name}: got {value}, expected at least {least}.")
        self.path, self.books = Path(path).expanduser(), books
        self.length, self.entities, self.encoding = length, entities, check_encoding(encoding)
        self._found: dict[str, list[Question]] | None = None  # by split

    def _questions(self, split: str) -> Iterator[Question]:
        if self._found is None:
            self._found = {"train": [], "valid": [], "test": []}
            for book in book_files(self.path, self.books):
                text = read_book(book, self.encoding)
                for part, question in questions_of(text, book.stem, self.length, self.entities):
                    self._found[_SPLITS.get(part % 10, "train")].append(question)
        yield from self._found.pop(split)


def questions_of(text: str, name: str, length: int, entities: int) -> Iterator[tuple[int, Question]]:
    """The questions that a book gives, each with the number of its part, from 0 to 19.

    Of a sentence's entities each is asked that stands in the document, if that has others.
    Raises ExperimentError for a text that gives none.
    """
    plain = sentences("\n\n".join(works(text)))
    names = names_in(plain)
    whole = [mentioning(sentence, names) for sentence in plain]
    count = 0
    for part in range(_PARTS):
        first, end = (number * len(whole) // _PARTS for number in (part, part + 1))
        for i in range(first, end):
            if not _SHORTEST <= len(whole[i]) <= _LONGEST or not any(isinstance(word, Mention) for word in whole[i]):
                continue
            for number, question in enumerate(_asked(_before(whole, first, i, length), whole[i], entities), start=1):
                count += 1
                yield part, Question(f"{name}:{i}.{number}", *question)
    if not count:
        raise ExperimentError(
            f"{name}: no sentence names an entity that was named shortly before, so nothing is asked."
        )


def _before(whole: list[Sentence], first: int, i: int, length: int) -> Sentence:
    """The words of the sentences before the i-th, from the first on, of which as many are taken as fit."""
    start, words = i, 0
    while start > first and words + len(whole[start - 1]) <= length:
        start -= 1
        words += len(whole[start])
    return [word for sentence in whole[start:i] for word in sentence]


def _asked(read: Sentence, asked: Sentence, entities: int) -> Iterator[tuple[list[str], list[str], str]]:
    """Document, query and answer of each question."""
    of = merged(word for word in read + asked if isinstance(word, Mention))
    named = dict.fromkeys(of[word] for word in read if isinstance(word, Mention))
    in_query = dict.fromkeys(of[word] for word in asked if isinstance(word, Mention))
    marker = {one: f"@entity{number}" for number, one in enumerate(named | in_query)}
    if len(named) < _CANDIDATES or len(marker) > entities:
        return
    document, query = (
        [marker[of[word]] if isinstance(word, Mention) else word.lower() for word in words] for words in (read, asked)
    )
    for one in in_query:
        if one in named:
            answer = marker[one]
            yield document, [PLACEHOLDER if word == answer else word for word in query], answer
