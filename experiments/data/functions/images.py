"""Image completion: an image is a function of the pixel's place."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.functions.batches import Sizes
from experiments.data.functions.curves import Interval
from experiments.data.functions.function_data import FunctionData
from experiments.data.functions.function_sets import Functions, Pictures, Predict
from experiments.data.functions.image_files import held_out, read_idx, read_omniglot
from experiments.data.functions.pictures import completions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Images(FunctionData):
    """Images of which some pixels are seen: Omniglot's characters, or files in MNIST's format.

    Omniglot is held out by alphabet, a file by its last images where there is no other one for the test.
    Raises ExperimentError at construction for a setting out of range, and in `setup` for files that cannot be used.

    Args:
        root: the folder with Omniglot's `images_*.zip`, or with a folder `omniglot` of them.
        size: height and width that Omniglot's images of 105 × 105 are scaled to.
        valid_alphabets: held out for validation.
        test_alphabets: held out for test.
        path: an IDX file of images, such as train-images-idx3-ubyte.gz, instead of Omniglot.
        test_path: one for the test, of images as large. None: the last images of `path`.
        valid: the fraction of `path` held out for validation, and as much for test where there is no `test_path`.
        context, targets, most, ragged, batch_size, epoch, seed, eval_seed: see `Curves`.
        eval_context: `context` in validation and test; None: the same.
        eval_targets: the same of `targets`; None: all other pixels.
        valid_tasks: at most so many images of the validation.
        test_tasks: at most so many of the test.
        eval_batch_size: images in a batch of these.
    """

    def __init__(
        self,
        root: str | None = None,
        size: int = 28,
        valid_alphabets: tuple[str, ...] = ("Tagalog",),
        test_alphabets: tuple[str, ...] = ("Sanskrit",),
        path: str | None = None,
        test_path: str | None = None,
        valid: float = 0.1,
        context: Interval = (3, 196),
        targets: Interval = (3, 196),
        most: int | None = 199,
        eval_context: Interval | None = None,
        eval_targets: Interval | None = None,
        ragged: bool = False,
        batch_size: int = 16,
        epoch: int = 1000,
        valid_tasks: int = 1024,
        test_tasks: int = 10_000,
        eval_batch_size: int = 16,
        seed: int | None = None,
        eval_seed: int = 0,
    ) -> None:
        shared = (ragged, epoch, valid_tasks, test_tasks, eval_batch_size, seed, eval_seed)
        eval_sizes = Sizes(eval_context or context, eval_targets)
        super().__init__(batch_size, Sizes(context, targets, most), eval_sizes, *shared)
        if (root is None) == (path is None):
            raise ExperimentError(
                "--data.root, --data.path: expected one of them: the folder of Omniglot, or an IDX file of images."
            )
        if size < 1:
            raise ExperimentError(f"--data.size: got {size}, expected at least 1.")
        if not 0 < valid < 0.5:
            raise ExperimentError(f"--data.valid: got {valid}, expected a fraction above 0 and below 0.5.")
        self.root, self.size, self.path, self.test_path, self.valid = root, size, path, test_path, valid
        self.alphabets = {"valid": valid_alphabets, "test": test_alphabets}

    @property
    def features(self) -> tuple[int, int]:
        return 2, 1

    def _functions(self) -> dict[str, Mapping[str, Functions]]:
        splits = self._omniglot() if self.path is None else self._file(Path(self.path).expanduser())
        pixels = splits["train"].shape[1] * splits["train"].shape[2]
        for prefix, sizes in (("", self.sizes), ("eval_", self.eval_sizes)):
            needed = sizes.context[1] + 1 if sizes.targets is None else sizes.highest
            if needed > pixels:
                raise ExperimentError(f"--data.{prefix}context: up to {needed} points of a task, of {pixels} pixels.")
        name = "omniglot" if self.path is None else "images"
        return {split: {name: Pictures(images)} for split, images in splits.items()}

    def _omniglot(self) -> dict[str, Tensor]:
        alphabets = read_omniglot(Path(self.root or "").expanduser(), self.size)
        chosen = {split: held_out(alphabets, names, f"{split}_alphabets") for split, names in self.alphabets.items()}
        chosen["train"] = [name for name in alphabets if not any(name in names for names in chosen.values())]
        for split, names in chosen.items():
            if not names:
                raise ExperimentError(f"--data.valid_alphabets, --data.test_alphabets: they leave none for {split}.")
        return {split: torch.cat([alphabets[name] for name in names]) for split, names in chosen.items()}

    def _file(self, path: Path) -> dict[str, Tensor]:
        images = read_idx(path)
        cut = max(1, int(self.valid * len(images)))
        if len(images) < 3:
            raise ExperimentError(f"{path}: got {len(images)} images, expected at least 3, to hold some out.")
        if self.test_path is not None:
            test = read_idx(Path(self.test_path).expanduser())
            if test.shape[1:] != images.shape[1:]:
                got, expected = (" × ".join(map(str, values.shape[1:])) for values in (test, images))
                raise ExperimentError(
                    f"--data.test_path: its images are {got}, expected {expected} as those of {path}."
                )
            return {"train": images[:-cut], "valid": images[-cut:], "test": test}
        return {"train": images[: -2 * cut], "valid": images[-2 * cut : -cut], "test": images[-cut:]}

    def pictures(self, predict: Predict) -> "dict[str, Figure]":
        [functions] = self._sets["test"].values()
        assert isinstance(functions, Pictures)
        return {"predictions": completions(functions, self.eval_sizes, predict, self.eval_seed)}
