"""The words and the answers of questions, and their numbers."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.reading.questions import Encoded, Question
from experiments.data.text.words import UNK

_MARKER = re.compile(r"@entity(\d+)")


class Wording(NamedTuple):
    """Word 0 is `<unk>`, which stands for all that are unknown; E markers of entities follow, then the other words.

    Where there are markers, these are the answers. Otherwise answer 0 is `<unk>`, and the others are those of the
    training, the commonest first.
    """

    words: list[str]
    answers: list[str]

    @property
    def markers(self) -> int:
        """E; 0 where answers are words."""
        return len(self.answers) if marker_number(self.answers[0]) is not None else 0

    def numbers_of_answers(self) -> Tensor:  # (V,) int64
        """The answer that each word is, −1 for those that are none."""
        of_answer = {answer: number for number, answer in enumerate(self.answers) if answer != UNK}
        return torch.tensor([of_answer.get(word, -1) for word in self.words])

    def state_dict(self) -> dict[str, Any]:
        """Plain values, of which `from_state` makes the same. One text is read much faster than a list."""
        return {"words": " ".join(self.words), "answers": " ".join(self.answers)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Wording":
        return cls(state["words"].split(), state["answers"].split())


def marker_number(word: str) -> int | None:
    """N of `@entityN`; None for other words."""
    match = _MARKER.fullmatch(word)
    return None if match is None else int(match[1])


def encoded(
    questions: Callable[[str], Iterable[Question]],  # those of "train", "valid" or "test"
    max_words: int | None,  # beside `<unk>` and the markers
    min_count: int,
) -> tuple[Wording, dict[str, list[Encoded]]]:
    """The wording that the training's questions give, and all questions in numbers.

    No question is kept in words: a corpus such as CNN's has 300 million.
    Raises ExperimentError for a split without questions, and for one without a document or a query.
    """
    numbers: dict[str, int] = {}  # of words and markers, as they come
    answers: dict[str, int] = {}
    counts: dict[str, int] = {}  # of the training's answers
    sets: dict[str, list[Encoded]] = {}
    known = 0  # words of the training
    for split in ("train", "valid", "test"):
        sets[split] = []
        for name, document, query, answer, group in questions(split):
            if not document or not query:
                raise ExperimentError(f"{name}: the {'query' if document else 'document'} is empty, expected words.")
            parts = [
                torch.tensor([numbers.setdefault(word, len(numbers)) for word in words], dtype=torch.int32)
                for words in (document, query)
            ]
            sets[split].append(Encoded(name, *parts, answers.setdefault(answer, len(answers)), group))
            if split == "train":
                counts[answer] = counts.get(answer, 0) + 1
        if not sets[split]:
            raise ExperimentError(f"the data have no questions for the split '{split}', expected some. Give more text.")
        known = known or len(numbers)
    wording = Wording(_words(numbers, sets["train"], known, max_words, min_count), _answers(counts, [*numbers]))
    of_word, of_answer = ({word: i for i, word in enumerate(part)} for part in wording)
    new_words = torch.tensor([of_word.get(word, 0) for word in numbers], dtype=torch.int32)
    new_answers = [of_answer.get(answer, 0) for answer in answers]
    for split, of_split in sets.items():
        sets[split] = [
            one._replace(
                document=new_words[one.document.long()],
                query=new_words[one.query.long()],
                answer=new_answers[one.answer],
            )
            for one in of_split
        ]
    return wording, sets


def _words(
    numbers: Mapping[str, int], train: list[Encoded], known: int, max_words: int | None, min_count: int
) -> list[str]:
    counts = torch.zeros(known, dtype=torch.int64)
    for one in train:
        for words in (one.document, one.query):
            counts += torch.bincount(words, minlength=known)
    seen = [(word, counts[number].item()) for word, number in numbers.items() if number < known]
    frequent = sorted((one for one in seen if one[1] >= min_count), key=lambda one: -one[1])
    kept = [word for word, _ in frequent if marker_number(word) is None and word != UNK]
    return [UNK, *_markers(numbers), *kept[:max_words]]


def _answers(counts: Mapping[str, int], words: list[str]) -> list[str]:
    return _markers(words) or [UNK, *sorted(counts, key=lambda answer: -counts[answer])]


def _markers(words: Iterable[str]) -> list[str]:
    """All that there are in any split, by their numbers."""
    numbers = {word: number for word in words if (number := marker_number(word)) is not None}
    return sorted(numbers, key=lambda word: numbers[word])
