"""The data of a character or byte language model."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pooch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.text import corpora
from experiments.data.text.corpora import Corpus, Splits
from experiments.data.text.vocabulary import Unit, Vocabulary
from experiments.data.text.windows import Batch, Windows

__all__ = ["Batch", "TextData", "Windows"]

_HELD_OUT = 0.05


class TextData(LightningDataModule):
    """A text, named or from disk, as windows over parallel contiguous streams.

    The vocabulary is that of the whole text, held-out parts included, as the published results have it.
    Raises ExperimentError at construction for a setting out of range, and in `setup` for a text that cannot be used.

    Args:
        corpus: The named text; `ptb`, `text8` and `enwik8` are downloaded if they are not below `root`.
        path: A text file, or a directory of `*.txt` files (searched recursively, joined in the order of their paths,
            newlines as they are). Overrides `corpus`.
        unit: What a symbol is. None: the corpus's own; characters for a path.
        valid: The fraction held out for validation, for `path` and `pydoc`: train | valid | test.
        test: The fraction held out for test, at the end.
        root: The folder of the named corpora, searched as `root/NAME/FILE` and `root/FILE`; downloads go to the former.
            None: the user's cache folder for multint.
        batch_size: Parallel streams in training, shared out among the processes where there are several.
        length: Symbols in a training window.
        eval_batch_size: Parallel streams in evaluation; 1 reads the text as it is, from start to end.
        eval_length: Symbols in an evaluation window; results do not depend on it where the state is carried.
    """

    def __init__(
        self,
        corpus: Corpus = "pydoc",
        path: str | None = None,
        unit: Unit | None = None,
        valid: float = _HELD_OUT,
        test: float = _HELD_OUT,
        root: str | None = None,
        batch_size: int = 32,
        length: int = 50,
        eval_batch_size: int = 1,
        eval_length: int = 500,
    ) -> None:
        super().__init__()
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
        _warn_of_idle(corpus, path, (valid, test) != (_HELD_OUT, _HELD_OUT), root)
        if path is None and unit == "characters" and corpus == "enwik8":
            # Its published splits are counted in bytes and cut characters in two.
            raise ExperimentError("--data.unit: enwik8 is split by bytes, got characters. Leave --data.unit out.")
        self.corpus: Corpus = corpus
        self.path = path
        self.unit = unit
        self.valid, self.test = valid, test
        self.root = Path(root).expanduser() if root is not None else Path(pooch.os_cache("multint"))
        self.batch_size, self.length = batch_size, length
        self.eval_batch_size, self.eval_length = eval_batch_size, eval_length
        self._vocabulary: Vocabulary | None = None
        self._streams: dict[str, Tensor] = {}  # (N,) compact ids of each split

    @property
    def vocabulary(self) -> Vocabulary:
        """The symbols of the whole text, sorted; available after `setup`."""
        if self._vocabulary is None:
            raise RuntimeError("TextData.vocabulary: the text is not read yet; call setup() first.")
        return self._vocabulary

    def prepare_data(self) -> None:
        """Downloads the corpus if it is not on disk. Raises ExperimentError where that fails."""
        if self.path is None:
            corpora.files(self.corpus, self.root)

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
        splits = self._read()
        # No joined copy: these texts can be 100 MB.
        symbols: Any = sorted(set().union(*(set(text) for text in splits)))
        vocabulary = Vocabulary(symbols)
        streams = {name: vocabulary.encode_compact(text) for name, text in splits._asdict().items()}
        self._check_lengths({name: len(stream) for name, stream in streams.items()})
        self._vocabulary, self._streams = vocabulary, streams

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

    def _processes(self) -> tuple[int, int]:
        """This process's rank, and how many train together."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _read(self) -> Splits:
        if self.path is not None:
            text = corpora.read(Path(self.path).expanduser(), self.unit or "characters")
            splits = corpora.hold_out(text, self.valid, self.test)
        elif self.corpus == "pydoc":
            splits = corpora.hold_out(corpora.pydoc(), self.valid, self.test)
        else:
            splits = corpora.load(self.corpus, self.root)
        if self.unit != "bytes":
            return splits
        return Splits(*(text.encode() if isinstance(text, str) else text for text in splits))

    def _check_lengths(self, got: dict[str, int]) -> None:
        source = self.path or self.corpus
        needed = self.batch_size * self.length + 1
        if got["train"] < needed:
            raise ExperimentError(
                f"{source}: {got['train']} symbols to train on, expected at least {needed}: one window of "
                f"{self.length} for each of {self.batch_size} streams, and one symbol to predict last. "
                "Lower --data.batch_size or --data.length, or use a longer text."
            )
        for split in ("valid", "test"):
            if got[split] <= self.eval_batch_size:
                raise ExperimentError(
                    f"{source}: {got[split]} symbols held out by --data.{split}, expected at least "
                    f"{self.eval_batch_size + 1}. Raise --data.{split}, lower --data.eval_batch_size, "
                    "or use a longer text."
                )

    def _resume_at(self) -> int:
        """The window that a restarted epoch goes on at: Lightning's count, right once that epoch has begun."""
        assert self.trainer is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # Restarting after an epoch's last batch, Lightning may ask for one more before it sees that the epoch is over.
        return done if done < self.trainer.num_training_batches else sys.maxsize


def _warn_of_idle(corpus: Corpus, path: str | None, fractions_set: bool, root: str | None) -> None:
    """Warns of the settings given that have no effect."""
    downloaded = path is None and corpus != "pydoc"
    idle = {
        "--data.corpus": path is not None and corpus != "pydoc",
        "--data.root": root is not None and not downloaded,
        "--data.valid, --data.test": fractions_set and downloaded,
    }
    source = "--data.path" if path is not None else f"the corpus {corpus}"
    for setting, is_idle in idle.items():
        if is_idle:
            warnings.warn(f"{setting}: no effect together with {source}.", stacklevel=3)
