"""Copy memory: a word is read, and asked for after a delay."""

import math
from typing import Any

import torch

from experiments.data.synthetic.recall import Recall
from experiments.data.synthetic.synthetic_data import SyntheticData


class CopyMemory(SyntheticData):
    """A word of random symbols, blanks, a bell, and as many blanks as the word is long, at which it is to be repeated.

    x is √X times the one-hot code of the K symbols, the blank and the bell, X = K + 2, of unit second moment. Who
    guesses has log K nats for each symbol and an accuracy of 1/K. (Publications take the mean over all steps, of which
    nearly all are blank: that is ours times `length` / (2 · `length` + `delay`).)

    Args:
        symbols: K.
        length: of the word.
        delay: steps between the word's end and the first symbol asked for, of which the last is the bell's.
        batch_size, epoch, eval_examples, seed: see `SyntheticData`.

    Source: Hochreiter and Schmidhuber 1997, as in Arjovsky et al. 2016, who have 8 symbols, 10 of them and a delay of
    100 to 500.
    """

    def __init__(
        self,
        symbols: int = 8,
        length: int = 10,
        delay: int = 100,
        batch_size: int = 64,
        epoch: int = 500,
        eval_examples: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, epoch, eval_examples, seed)
        self.check(symbols=symbols, length=length, delay=delay)
        self.symbols, self.length, self.delay = symbols, length, delay

    def learnt(self) -> dict[str, Any]:
        return {"inputs": self.symbols + 2, "outputs": self.symbols}

    def draw(self, count: int, split: str, generator: torch.Generator) -> Recall:
        X = self.symbols + 2
        blank, bell = self.symbols, self.symbols + 1
        word = torch.randint(self.symbols, (self.length, count), generator=generator)
        read = torch.full((2 * self.length + self.delay, count), blank)
        read[: self.length] = word
        read[self.length + self.delay - 1] = bell
        return Recall(math.sqrt(X) * torch.nn.functional.one_hot(read, X).float(), word)
