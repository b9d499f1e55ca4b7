"""Words of four regular languages, and what each comes to: asked for at the last symbol."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.synthetic.recall import Recall
from experiments.data.synthetic.synthetic_data import SyntheticData

Language = Literal["cycle_navigation", "even_pairs", "arithmetic", "parity"]
Word = Tensor  # (T, B) int64, symbols


def _cycle_navigation(word: Word) -> Tensor:
    return torch.tensor([0, 1, -1])[word].sum(0) % 5


def _even_pairs(word: Word) -> Tensor:
    # Each pair is a change of the symbol, and after an even number of changes it is the first one again.
    return (word[0] == word[-1]).long()


def _arithmetic(word: Word) -> Tensor:
    """The sum of the terms that are complete, and the last one, a signed product that may go on."""
    total, term = torch.zeros_like(word[0]), word[0]
    for operation, number in zip(word[1::2] - 5, word[2::2], strict=True):
        is_product = operation == 2
        total = torch.where(is_product, total, total + term) % 5
        term = torch.where(is_product, term * number, torch.where(operation == 1, -number, number)) % 5
    return (total + term) % 5


def _parity(word: Word) -> Tensor:
    return word.sum(0) % 2


class _Rules(NamedTuple):
    symbols: int
    answers: int
    answer: Callable[[Word], Tensor]  # (B,) int64


_RULES: dict[Language, _Rules] = {
    "cycle_navigation": _Rules(3, 5, _cycle_navigation),
    "even_pairs": _Rules(2, 2, _even_pairs),
    "arithmetic": _Rules(8, 5, _arithmetic),
    "parity": _Rules(2, 2, _parity),
}


class RegularLanguage(SyntheticData):
    """Uniformly random words of a regular language, each batch of one length, and their answers at the last symbol.

    x is √S times the one-hot code of the S symbols, of unit second moment. Training has words of `shortest` to `length`
    symbols, each length as often as another; validation and test have other words, of `length` to `test_length`.

    Args:
        language: "cycle_navigation": stay, one on, one back, on a cycle of 5; where it ends. "even_pairs": symbols a
            and b; whether ab and ba are together an even number. "arithmetic": digits 0 to 4 and +, −, × in turns, so
            that lengths are odd; the value modulo 5, × before + and −. "parity": of the number of ones.
        shortest, length, test_length: see above.
        batch_size, epoch, eval_examples, seed: see `SyntheticData`.

    Raises ExperimentError for lengths that fall, or between which none is odd where it must be.
    Source: Delétang et al. 2023.
    """

    def __init__(
        self,
        language: Language = "parity",
        shortest: int = 3,
        length: int = 40,
        test_length: int = 256,
        batch_size: int = 64,
        epoch: int = 100,
        eval_examples: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, epoch, eval_examples, seed)
        self.check(shortest=shortest)
        for name, least, most in (("length", shortest, length), ("test_length", length, test_length)):
            if most < least:
                raise ExperimentError(f"--data.{name}: got {most}, expected at least {least}, the length before it.")
        self.language: Language = language
        self.lengths = {"train": self._lengths(shortest, length), "test": self._lengths(length, test_length)}

    def _lengths(self, least: int, most: int) -> list[int]:
        lengths = [n for n in range(least, most + 1) if n % 2 or self.language != "arithmetic"]
        if not lengths:
            raise ExperimentError(
                f"--data.length: arithmetic has words of odd lengths, and {least} to {most} has none."
            )
        return lengths

    def learnt(self) -> dict[str, Any]:
        rules = _RULES[self.language]
        return {"inputs": rules.symbols, "outputs": rules.answers}

    def draw(self, count: int, split: str, generator: torch.Generator) -> Recall:
        rules, lengths = _RULES[self.language], self.lengths["train" if split == "train" else "test"]
        length = lengths[int(torch.randint(len(lengths), (), generator=generator))]
        if self.language == "arithmetic":
            word = torch.randint(5, (length, count), generator=generator)
            word[1::2] = 5 + torch.randint(3, (length // 2, count), generator=generator)
        else:
            word = torch.randint(rules.symbols, (length, count), generator=generator)
        xs = math.sqrt(rules.symbols) * torch.nn.functional.one_hot(word, rules.symbols).float()
        return Recall(xs, rules.answer(word).unsqueeze(0))
