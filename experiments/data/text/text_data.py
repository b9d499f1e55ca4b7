"""The data of a character or byte language model."""

from pathlib import Path
from typing import Any

from experiments.core.errors import ExperimentError
from experiments.data.text import corpora
from experiments.data.text.corpora import Corpus, Splits
from experiments.data.text.stream_data import HELD_OUT, Encoded, StreamData, warn_of_idle
from experiments.data.text.vocabulary import Unit, Vocabulary


class TextData(StreamData):
    """A text's characters or bytes, named or from disk, as windows over parallel contiguous streams.

    The vocabulary is that of the whole text, sorted, held-out parts included, as the published results have it.
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

    symbols = "symbols"
    published = {"ptb": 50, "text8": 27, "enwik8": 205}  # noqa: RUF012

    def __init__(
        self,
        corpus: Corpus = "pydoc",
        path: str | None = None,
        unit: Unit | None = None,
        valid: float = HELD_OUT,
        test: float = HELD_OUT,
        root: str | None = None,
        batch_size: int = 32,
        length: int = 50,
        eval_batch_size: int = 1,
        eval_length: int = 500,
    ) -> None:
        super().__init__(corpus, path, valid, test, root, batch_size, length, eval_batch_size, eval_length)
        is_downloaded = path is None and corpus != "pydoc"
        warn_of_idle(
            "--data.path" if path is not None else f"the corpus {corpus}",
            {
                "--data.root": root is not None and not is_downloaded,
                "--data.valid, --data.test": (valid, test) != (HELD_OUT, HELD_OUT) and is_downloaded,
            },
        )
        if path is None and unit == "characters" and corpus == "enwik8":
            # Its published splits are counted in bytes and cut characters in two.
            raise ExperimentError("--data.unit: enwik8 is split by bytes, got characters. Leave --data.unit out.")
        self.corpus: Corpus = corpus
        self.unit = unit

    @property
    def known_vocabulary_size(self) -> int | None:
        """See `StreamData`. The text of `pydoc` is Python's own, and always there."""
        is_there = self.path is None and self.corpus == "pydoc"
        return len(self._encoded().vocabulary) if is_there else super().known_vocabulary_size

    def prepare_data(self) -> None:
        """Downloads the corpus if it is not on disk. Raises ExperimentError where that fails."""
        if self.path is None:
            corpora.files(self.corpus, self.root)

    def _encoded(self) -> Encoded:
        splits = self._read()
        # No joined copy: these texts can be 100 MB.
        symbols: Any = sorted(set().union(*(set(text) for text in splits)))
        vocabulary = Vocabulary(symbols)
        streams = {name: vocabulary.encode_compact(text) for name, text in splits._asdict().items()}
        return Encoded(vocabulary, streams, is_cut=self.path is not None or self.corpus == "pydoc")

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
