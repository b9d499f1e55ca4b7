"""Digits that are read line by line, or pixel by pixel."""

from typing import Any, Literal

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.synthetic.recall import Recall
from experiments.data.synthetic.synthetic_data import SyntheticData

_HELD_OUT = 300  # images of 1797, for validation, and as many for the test
_BRIGHTEST = 16


class SequentialDigits(SyntheticData):
    """Scikit-learn's 1797 handwritten digits of 8 × 8 pixels, each a sequence whose class is asked for at its end.

    The images of the validation and of the test, 300 each, are the same for every seed; training draws from the other
    1197. The same writers are in all three. Who guesses is right in a tenth.

    Args:
        read: "pixels", T = 64 of 1 feature, or "rows", T = 8 of 8 features, brightness in [0, 1].
        batch_size, epoch, seed: see `SyntheticData`.

    Raises ExperimentError in `setup` without scikit-learn (extra `digits`).
    Source: Alpaydin and Kaynak 1998 for the images; Le et al. 2015 for reading them pixel by pixel.
    """

    def __init__(
        self,
        read: Literal["pixels", "rows"] = "pixels",
        batch_size: int = 64,
        epoch: int = 500,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, epoch, _HELD_OUT, seed)
        self.read = read
        self._sets: dict[str, tuple[Tensor, Tensor]] = {}

    def learnt(self) -> dict[str, Any]:
        return {"inputs": 1 if self.read == "pixels" else 8, "outputs": 10}

    def setup(self, stage: str | None = None) -> None:
        """Reads the images, which come with scikit-learn."""
        super().setup(stage)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ExperimentError(
                'data: SequentialDigits takes the images of scikit-learn: pip install -c constraints.txt -e ".[digits]"'
            ) from error
        images, classes = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        sizes = [len(images) - 2 * _HELD_OUT, _HELD_OUT, _HELD_OUT]
        for split, kept in zip(("train", "valid", "test"), order.split(sizes), strict=True):
            self._sets[split] = images[kept].float() / _BRIGHTEST, classes[kept].long()

    def draw(self, count: int, split: str, generator: torch.Generator) -> Recall:
        return self._examples(split, torch.randint(len(self._sets[split][1]), (count,), generator=generator))

    def held_out(self, first: int, count: int, split: str, generator: torch.Generator) -> Recall:
        """Every image of the set once."""
        return self._examples(split, torch.arange(first, first + count))

    def _examples(self, split: str, which: Tensor) -> Recall:
        images, classes = self._sets[split]
        xs = images[which].view(len(which), -1, self.learnt()["inputs"]).transpose(0, 1)
        return Recall(xs.contiguous(), classes[which].unsqueeze(0))
