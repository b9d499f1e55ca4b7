"""The words of a text and their indices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError, nearest_message
from experiments.data.text.detokenise import detokenised
from experiments.data.text.vocabulary import Vocabulary

EOS = "<eos>"  # the end of a line
UNK = "<unk>"  # a word outside the vocabulary


class WordVocabulary:
    """A bijection between words and the indices 0 … V-1; `<eos>` and `<unk>` are two of them.

    Raises ExperimentError where a word occurs twice or holds white space, or one of these two is missing.
    """

    def __init__(
        self,
        words: Sequence[str],
    ) -> None:
        self.words = tuple(words)
        self._indices = {word: index for index, word in enumerate(self.words)}
        if len(self._indices) < len(self.words):
            raise ExperimentError("WordVocabulary: a word occurs twice, expected distinct words.")
        if missing := {EOS, UNK} - self._indices.keys():
            raise ExperimentError(f"WordVocabulary: {min(missing)} is not among the words, expected {EOS} and {UNK}.")
        if len(" ".join(self.words).split()) != len(self.words):
            raise ExperimentError("WordVocabulary: a word is empty or holds white space.")

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "WordVocabulary":
        """The vocabulary whose `state_dict()` this is."""
        return cls(state["symbols"].split())

    def state_dict(self) -> dict[str, Any]:
        """`{"unit": "words", "symbols": "the , <eos> …"}`: plain values, the words in order, spaces between them.

        One text, not a list: `torch.load` reads 267,735 words 100 times as fast so.
        """
        return {"unit": "words", "symbols": " ".join(self.words)}

    @property
    def start(self) -> int:
        """What a network reads first where nothing precedes: `<eos>`, as at the start of a line."""
        return self._indices[EOS]

    @property
    def unknown(self) -> int:
        """The index of `<unk>`."""
        return self._indices[UNK]

    def encode(self, text: str) -> Tensor:
        """The indices of the text's words, (N,) int64: white space separates them, a line break is `<eos>`.

        Raises ExperimentError naming the first word that is not in the vocabulary. `<unk>` can be written out.
        """
        words = text.replace("\n", f" {EOS} ").split()
        for word in words:
            if word not in self._indices:
                raise self._stranger(word)
        return torch.tensor([self._indices[word] for word in words], dtype=torch.long)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The words of these indices, (N,), as one would write them; see `detokenised`."""
        return detokenised(self.words[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids))

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordVocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        return f"WordVocabulary({len(self)} words)"

    def _stranger(self, word: str) -> ExperimentError:
        meant = word.lower() if word.lower() in self._indices else word
        frequent = self.words[:10_000]  # the search takes seconds for all
        return ExperimentError(
            f"WordVocabulary: {word!r} is not among the {len(self)} words of this vocabulary"
            f"{nearest_message(meant, frequent) or '.'} Words are written as in the training text, punctuation apart "
            f"from them; {UNK} stands for any other word."
        )


def vocabulary_from(state: dict[str, Any]) -> Vocabulary | WordVocabulary:
    """The vocabulary of characters, bytes or words whose `state_dict()` this is."""
    return (WordVocabulary if state["unit"] == "words" else Vocabulary).from_state_dict(state)
