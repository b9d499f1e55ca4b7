"""A network to be imitated."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.core.errors import building
from experiments.data.batch_streams import generator_of
from experiments.data.synthetic.pairs import Pairs
from experiments.data.synthetic.synthetic_data import SyntheticData
from multint import Integrator

_SCALED_ON = 2**14  # examples


class Teacher(SyntheticData):
    """y = (f(x, z) − μ) / σ for normal x and z, where f is a network drawn from the seed: any integrator.

    μ and σ are the outputs' means and deviations over 2¹⁴ examples, so that predicting 0 has an error of about 1.
    With `Bilinear` without its lower-order terms, f(x, z) = xᵀAz with a normal-sized random A.

    Args:
        teacher: factory `(X, Z, O) -> Integrator` of f.
        x_features, z_features, out_features: X, Z and O.
        batch_size, epoch, eval_examples, seed: see `SyntheticData`.
    """

    def __init__(
        self,
        teacher: Callable[[int, int, int], Integrator],
        x_features: int = 8,
        z_features: int = 8,
        out_features: int = 1,
        batch_size: int = 512,
        epoch: int = 250,
        eval_examples: int = 8192,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, epoch, eval_examples, seed)
        self.check(x_features=x_features, z_features=z_features, out_features=out_features)
        self.features = (x_features, z_features, out_features)
        self._build = teacher
        self.teacher: Integrator | None = None
        self.mean, self.deviation = torch.zeros(out_features), torch.ones(out_features)

    def learnt(self) -> dict[str, Any]:
        return {"features": list(self.features)}

    def setup(self, stage: str | None = None) -> None:
        """Builds the teacher, once for all stages."""
        super().setup(stage)
        if self.teacher is not None:
            return
        with torch.random.fork_rng(devices=[]), building("data: the teacher"):
            torch.manual_seed(generator_of(0, "teacher", self.seed).initial_seed())
            self.teacher = self._build(*self.features).requires_grad_(False).eval()
        y = self.draw(_SCALED_ON, "scale", generator_of(0, "scale", self.seed)).y
        self.deviation, self.mean = torch.std_mean(y, dim=0)

    def draw(self, count: int, split: str, generator: torch.Generator) -> Pairs:
        assert self.teacher is not None
        x, z = (torch.randn(count, features, generator=generator) for features in self.features[:2])
        y: Tensor = self.teacher(x, z)
        return Pairs(x, z, (y - self.mean) / self.deviation)
