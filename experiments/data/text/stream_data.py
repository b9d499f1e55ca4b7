"""What the data of all language models share: streams of symbols, and windows over them."""

import sys
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import pooch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.core.task import Data
from experiments.data.text.vocabulary import Vocabulary
from experiments.data.text.windows import Windows
from experiments.data.text.words import WordVocabulary

HELD_OUT = 0.05  # of a text without a split of its own, for validation and as much for test


class Encoded(NamedTuple):
    """A text as indices into its vocabulary."""

    vocabulary: Vocabulary | WordVocabulary
    streams: Mapping[str, Tensor]  # "train", "valid" and "test": (1 + N,) of any integer type, N to predict
    is_cut: bool  # by the fractions --data.valid and --data.test, where the text has no split of its own


class StreamData(Data):
    """A text, named or from disk, as windows over parallel contiguous streams.

    A subclass says what a symbol is: it gives `_encoded`, the text as indices, and `prepare_data`. Its
    arguments are those here, and `corpus`, the name of a text.
    Raises ExperimentError at construction for a setting out of range, and in `setup` for a text that cannot be used.
    """

    symbols: ClassVar[str]  # what messages call them
    published: ClassVar[Mapping[str, int]]  # the sizes of the named texts' vocabularies

    def __init__(
        self,
        corpus: str,
        path: str | None,
        valid: float,
        test: float,
        root: str | None,
        batch_size: int,
        length: int,
        eval_batch_size: int,
        eval_length: int,
    ) -> None:
        for name, place in (("path", path), ("root", root)):
            if place == "":
                # As from an unset shell variable; it would mean the current folder.
                raise ExperimentError(f"--data.{name}: got an empty text, expected a path. Or leave it out.")
        sizes = {
            "batch_size": batch_size,
            "length": length,
            "eval_batch_size": eval_batch_size,
            "eval_length": eval_length,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ExperimentError(f"--data.{name}: got {size}, expected at least 1.")
        if not (valid > 0 and test > 0 and valid + test < 1):
            raise ExperimentError(
                f"--data.valid, --data.test: got {valid} and {test}, expected fractions above 0 whose sum is below 1."
            )
        self.path = path
        self.source = path or corpus  # what messages call the text
        self.valid, self.test = valid, test
        self.root = Path(root).expanduser() if root is not None else Path(pooch.os_cache("multint"))
        self.batch_size, self.length = batch_size, length
        self.eval_batch_size, self.eval_length = eval_batch_size, eval_length
        self._vocabulary: Vocabulary | WordVocabulary | None = None
        self._streams: Mapping[str, Tensor] = {}  # (1 + N,) compact ids of each split

    @abstractmethod
    def _encoded(self) -> Encoded:
        """The text as indices. Raises ExperimentError where it cannot be used."""

    @property
    def known_vocabulary_size(self) -> int | None:
        """The size of the vocabulary where it is known without a download or a file of the user's; else None."""
        return None if self.path is not None else self.published.get(self.source)

    @property
    def vocabulary(self) -> Vocabulary | WordVocabulary:
        """The symbols and their indices; available after `setup`."""
        if self._vocabulary is None:
            raise RuntimeError(f"{type(self).__name__}.vocabulary: the text is not read yet; call setup() first.")
        return self._vocabulary

    def setup(self, stage: str | None = None) -> None:
        """Reads and encodes the text, once for all stages. Raises ExperimentError where it cannot be used."""
        processes = self._processes()[1]
        if self.batch_size % processes:
            raise ExperimentError(
                f"--data.batch_size: got {self.batch_size} streams for {processes} processes, expected a multiple of "
                f"{processes}, so that each has as many."
            )
        if self._streams:
            return
        encoded = self._encoded()
        self._check_lengths({name: max(len(stream) - 1, 0) for name, stream in encoded.streams.items()}, encoded.is_cut)
        self._vocabulary, self._streams = encoded.vocabulary, encoded.streams

    def train_dataloader(self) -> Windows:
        """Windows over `batch_size` streams, resumable within an epoch."""
        resume_at = None if self.trainer is None else self._resume_at
        return Windows(self._streams["train"], self.batch_size, self.length, resume_at, *self._processes())

    def val_dataloader(self) -> Windows:
        """Windows over `eval_batch_size` streams of the validation text."""
        return self._windows("valid")

    def test_dataloader(self) -> Windows:
        """Windows over `eval_batch_size` streams of the test text."""
        return self._windows("test")

    def _windows(self, split: str) -> Windows:
        return Windows(self._streams[split], self.eval_batch_size, self.eval_length, None, *self._processes())

    def _check_lengths(self, got: dict[str, int], is_cut: bool) -> None:
        needed = self.batch_size * self.length
        if got["train"] < needed:
            raise ExperimentError(
                f"{self.source}: {got['train']} {self.symbols} to train on, expected at least {needed}: one "
                f"window of {self.length} for each of {self.batch_size} streams. "
                "Lower --data.batch_size or --data.length, or use a longer text."
            )
        for split in ("valid", "test"):
            if got[split] < self.eval_batch_size:
                whence, remedy = f"in the {split} text", "Lower"
                if is_cut:
                    whence, remedy = f"held out by --data.{split}", f"Raise --data.{split}, lower"
                remedy = f"{remedy} --data.eval_batch_size, or use a longer text."
                if self.eval_batch_size == 1 and not is_cut:
                    remedy = "Use a longer text."
                raise ExperimentError(
                    f"{self.source}: {got[split]} {self.symbols} {whence}, expected at least "
                    f"{self.eval_batch_size}. {remedy}"
                )

    def _resume_at(self) -> int:
        """The window that a restarted epoch goes on at: Lightning's count, right once that epoch has begun."""
        _, done = self._position()
        # Restarting after an epoch's last batch, Lightning may ask for one more before it sees that the epoch is over.
        assert self.trainer is not None
        return done if done < self.trainer.num_training_batches else sys.maxsize


def warn_of_idle(source: str, idle: Mapping[str, bool]) -> None:
    """Warns of the settings, by name, that are given and have no effect with this source of text."""
    for setting, is_idle in idle.items():
        if is_idle:
            warnings.warn(f"{setting}: no effect together with {source}.", stacklevel=4)
