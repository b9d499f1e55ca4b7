"""The adding problem: two marked numbers of a long sequence."""

from typing import Any

import torch

from experiments.core.errors import ExperimentError
from experiments.data.synthetic.recall import Recall
from experiments.data.synthetic.synthetic_data import SyntheticData


class Adding(SyntheticData):
    """Numbers of U(0, 1), each beside a mark: 1 at one step in each half of the sequence, else 0. The sum of the two.

    Who answers 1 has a mean squared error of 1/6.

    Args:
        length: T.
        batch_size, epoch, eval_examples, seed: see `SyntheticData`.

    Raises ExperimentError for a length below 2.
    Source: Hochreiter and Schmidhuber 1997, with the marks of Arjovsky et al. 2016.
    """

    def __init__(
        self,
        length: int = 100,
        batch_size: int = 64,
        epoch: int = 500,
        eval_examples: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, epoch, eval_examples, seed)
        if length < 2:
            raise ExperimentError(f"--data.length: got {length}, expected at least 2: two numbers are marked.")
        self.length = length

    def learnt(self) -> dict[str, Any]:
        return {"inputs": 2, "outputs": 1}

    def draw(self, count: int, split: str, generator: torch.Generator) -> Recall:
        T, half = self.length, self.length // 2
        numbers = torch.rand(T, count, generator=generator)
        first = torch.randint(half, (1, count), generator=generator)
        second = torch.randint(half, T, (1, count), generator=generator)
        marks = torch.zeros(T, count).scatter_(0, torch.cat([first, second]), 1.0)
        return Recall(torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(0, keepdim=True))
