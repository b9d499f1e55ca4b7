"""Many tasks on the same inputs that contradict each other."""

import math
from typing import Any

import torch

from experiments.data.batch_streams import generator_of
from experiments.data.synthetic.pairs import Pairs
from experiments.data.synthetic.synthetic_data import SyntheticData


class AffineTasks(SyntheticData):
    """y = (A_k x + b_k) / √2 for the task k that z tells, with normal x and independent normal A_k / √X and b_k.

    Every task answers the same x in another way: who does not heed z has an error of about 1. z is √K times the one-hot
    code of k, of unit second moment.

    Args:
        tasks: K.
        x_features, out_features: X and O.
        batch_size, epoch, eval_examples, seed: see `SyntheticData`.
    """

    def __init__(
        self,
        tasks: int = 8,
        x_features: int = 8,
        out_features: int = 8,
        batch_size: int = 512,
        epoch: int = 250,
        eval_examples: int = 8192,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, epoch, eval_examples, seed)
        self.check(tasks=tasks, x_features=x_features, out_features=out_features)
        self.features = (x_features, tasks, out_features)

    def learnt(self) -> dict[str, Any]:
        return {"features": list(self.features)}

    def setup(self, stage: str | None = None) -> None:
        """Draws the tasks."""
        super().setup(stage)
        X, K, outputs = self.features
        generator = generator_of(0, "tasks", self.seed)
        self.A = torch.randn(K, outputs, X, generator=generator) / math.sqrt(X)
        self.b = torch.randn(K, outputs, generator=generator)

    def draw(self, count: int, split: str, generator: torch.Generator) -> Pairs:
        X, K, _ = self.features
        x, k = torch.randn(count, X, generator=generator), torch.randint(K, (count,), generator=generator)
        y = (torch.einsum("boi,bi->bo", self.A[k], x) + self.b[k]) / math.sqrt(2)
        return Pairs(x, math.sqrt(K) * torch.nn.functional.one_hot(k, K).float(), y)
