"""Digits that are read line by line, or pixel by pixel."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.functions.image_files import read_idx, read_labels
from experiments.data.synthetic.recall import Recall
from experiments.data.synthetic.synthetic_data import SyntheticData

_WIDTH, _BRIGHTEST = 8, 16
_HELD_OUT = 300  # images of 1797, for validation, and as many for the test
_MNIST_WIDTH, _MNIST_BRIGHTEST = 28, 255
_MNIST_HELD_OUT = 10_000  # for validation the last of the training images, and as many are in the test's file


class SequentialDigits(SyntheticData):
    """Handwritten digits, each a sequence whose class is asked for at its end.

    They are scikit-learn's, 1797 of 8 × 8 pixels: 300 are for the validation, as many for the test, and the same
    writers are in all three sets. Or MNIST's, of 28 × 28: 50,000, 10,000 and 10,000. The sets are the same for every
    seed; training draws from its own. Who guesses is right in a tenth.

    Args:
        read: "pixels", T = 64 or 784 of 1 feature, or "rows", T = 8 or 28 of as many features, brightness in [0, 1].
        batch_size, epoch, seed: see `SyntheticData`.
        permuted: read the pixels in a random order, the same for all images and seeds.
        path: a folder with MNIST's four files, or others in their format and size, packed by gzip or not; None for
            scikit-learn's.

    Raises ExperimentError for rows of permuted pixels; and in `setup` without scikit-learn (extra `digits`), and for
    files that are not there or are others.
    Source: Alpaydin and Kaynak 1998 for scikit-learn's images; Le et al. 2015 for reading pixel by pixel, in order and
    permuted.
    """

    def __init__(
        self,
        read: Literal["pixels", "rows"] = "pixels",
        batch_size: int = 64,
        epoch: int = 500,
        seed: int | None = None,
        permuted: bool = False,
        path: str | None = None,
    ) -> None:
        super().__init__(batch_size, epoch, _HELD_OUT if path is None else _MNIST_HELD_OUT, seed)
        if permuted and read == "rows":
            raise ExperimentError("--data.permuted: got true with --data.read=rows, expected --data.read=pixels.")
        self.read, self.permuted, self.path = read, permuted, path
        self._width = _WIDTH if path is None else _MNIST_WIDTH
        self._sets: dict[str, tuple[Tensor, Tensor]] = {}

    def learnt(self) -> dict[str, Any]:
        return {"inputs": 1 if self.read == "pixels" else self._width, "outputs": 10}

    def setup(self, stage: str | None = None) -> None:
        """Reads the images, which come with scikit-learn where no path is given."""
        super().setup(stage)
        self._sets = _of_scikit_learn() if self.path is None else _of_files(Path(self.path).expanduser())
        if self.permuted:
            order = torch.randperm(self._width**2, generator=torch.Generator().manual_seed(0))
            self._sets = {split: (images[:, order], classes) for split, (images, classes) in self._sets.items()}

    def draw(self, count: int, split: str, generator: torch.Generator) -> Recall:
        return self._examples(split, torch.randint(len(self._sets[split][1]), (count,), generator=generator))

    def held_out(self, first: int, count: int, split: str, generator: torch.Generator) -> Recall:
        """Every image of the set once."""
        return self._examples(split, torch.arange(first, first + count))

    def _examples(self, split: str, which: Tensor) -> Recall:
        images, classes = self._sets[split]
        xs = images[which].view(len(which), -1, self.learnt()["inputs"]).transpose(0, 1)
        return Recall(xs.contiguous(), classes[which].unsqueeze(0))


def _of_scikit_learn() -> dict[str, tuple[Tensor, Tensor]]:
    """Images (N, 64) and classes (N,) of each set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ExperimentError(
            'data: SequentialDigits takes the images of scikit-learn: pip install -c constraints.txt -e ".[digits]", '
            "or give a folder of MNIST's by --data.path"
        ) from error
    images, classes = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    sizes = [len(images) - 2 * _HELD_OUT, _HELD_OUT, _HELD_OUT]
    parts = zip(("train", "valid", "test"), order.split(sizes), strict=True)
    return {split: (images[kept].float() / _BRIGHTEST, classes[kept].long()) for split, kept in parts}


def _of_files(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Images (N, 784) and classes (N,) of each set."""
    (images, classes), test = (_pair(folder, name) for name in ("train", "t10k"))
    kept = len(images) - _MNIST_HELD_OUT
    if kept < 1 or len(test[0]) != _MNIST_HELD_OUT:
        raise ExperimentError(
            f"--data.path: {folder} has {len(images)} images to train on and {len(test[0])} for the test, expected "
            f"more than {_MNIST_HELD_OUT} and {_MNIST_HELD_OUT}, as MNIST has."
        )
    return {"train": (images[:kept], classes[:kept]), "valid": (images[kept:], classes[kept:]), "test": test}


def _pair(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    paths = [folder / f"{name}-images-idx3-ubyte", folder / f"{name}-labels-idx1-ubyte"]
    paths = [packed if (packed := path.with_name(f"{path.name}.gz")).is_file() else path for path in paths]
    images, classes = read_idx(paths[0]), read_labels(paths[1])
    if images.shape[1:] != (_MNIST_WIDTH, _MNIST_WIDTH) or len(images) != len(classes) or classes.max() > 9:
        raise ExperimentError(
            f"{paths[0]}: got {len(images)} images of {images.shape[1]} × {images.shape[2]}, and {len(classes)} labels "
            f"up to {classes.max()}, expected a label of 0 to 9 for each image of {_MNIST_WIDTH} × {_MNIST_WIDTH}."
        )
    return images.flatten(1).float() / _MNIST_BRIGHTEST, classes.long()
