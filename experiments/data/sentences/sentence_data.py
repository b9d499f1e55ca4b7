"""Books, as sentences with their neighbours."""

from collections.abc import Sequence
from pathlib import Path

import pooch
import torch

from experiments.core.errors import ExperimentError
from experiments.data.batch_streams import generator_of
from experiments.data.books import book_files, check_encoding
from experiments.data.buckets import BucketedData, Buckets
from experiments.data.sentences.tokens import Layout, Reading, split_into_words
from experiments.data.sentences.triples import Batch, Triples
from experiments.data.text.stream_data import HELD_OUT
from experiments.data.text.word_cache import encoded, warn_of_untaught
from experiments.data.text.word_encoding import Settings
from experiments.data.text.word_sources import SPLITS
from experiments.data.text.words import WordVocabulary

_CACHE = ".multint-cache"  # beside the books


class Books(BucketedData):
    """Sentences of books, each with the one before and the one after it in the same document.

    A file, or a work of a file with several of Project Gutenberg's, is a document; the Project's own words are left
    out. `experiments.data.sentences.splitting` has the rules by which a text becomes sentences, and these words, all in
    small letters. The end of each document is held out. The vocabulary is that of the training's sentences; `<eos>`
    ends each, and any other word is `<unk>`.

    The books are split and encoded once, into files beside them (`.multint-cache`, or the user's cache folder where
    none can be written there), which are found by the books' checksum and memory-mapped.

    Args:
        path: a text, or a folder of texts, with those in its folders; `.txt`, or `.zip` of one text.
        books: files in the folder, by their paths in it; None: all.
        layout: "prose" is split into sentences; of "lines", as in BookCorpus, each is a sentence.
        encoding: of the texts, by Python's name for it.
        max_vocabulary: entries of the vocabulary at most, `<unk>` and `<eos>` among them; the most frequent words stay.
        min_count: how often a word must stand in the training to be one of them.
        max_length: words of a sentence at most; triples with a longer one are left out.
        valid: the share of each document that is held out for validation.
        test: the share that is held out for the test.
        batch_size: triples in a batch; those in one have sentences of like lengths.
        seed: of the order in training; None takes the run's.

    Raises ExperimentError at construction for a setting out of range, and in `setup` for books that cannot be used.
    """

    def __init__(
        self,
        path: str,
        books: Sequence[str] | None = None,
        layout: Layout = "prose",
        encoding: str = "utf-8",
        max_vocabulary: int | None = 20_000,
        min_count: int = 2,
        max_length: int = 30,
        valid: float = HELD_OUT,
        test: float = HELD_OUT,
        batch_size: int = 64,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        for name, value, least in (
            ("max_vocabulary", max_vocabulary, 3),
            ("min_count", min_count, 1),
            ("max_length", max_length, 1),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise ExperimentError(f"--data.{name}: got {value}, expected at least {least}.")
        if layout not in ("prose", "lines"):
            raise ExperimentError(f"--data.layout: got {layout!r}, expected prose or lines.")
        if min(valid, test) <= 0 or valid + test >= 1:
            raise ExperimentError(
                f"--data.valid, --data.test: got {valid} and {test}, expected two shares that leave some."
            )
        self.path, self.books = Path(path).expanduser(), books
        self.reading = Reading(layout, check_encoding(encoding), valid, test)
        self.words = Settings(max_vocabulary, min_count)
        self.max_length, self.batch_size = max_length, batch_size
        self._vocabulary: WordVocabulary | None = None
        self._triples: dict[str, Triples] = {}  # by split
        self._orders: dict[str, torch.Tensor] = {}

    @property
    def vocabulary(self) -> WordVocabulary:
        """Available after `setup`."""
        assert self._vocabulary is not None
        return self._vocabulary

    def triples(self, split: str) -> Triples:
        """Those of "train", "valid" or "test"; available after `setup`."""
        return self._triples[split]

    def setup(self, stage: str | None = None) -> None:
        """Read the books, once for all stages. Raises ExperimentError where they cannot be used."""
        super().setup(stage)
        if self._triples:
            return
        files = book_files(self.path, self.books)
        folder = self.path if self.path.is_dir() else self.path.parent
        folders = [folder / _CACHE, Path(pooch.os_cache("multint")) / "sentences"]
        words = encoded(split_into_words(files, self.reading, folders), self.words, folders)
        if len(words.vocabulary) == 2:
            raise ExperimentError(
                f"{self.path}: no word occurs --data.min_count={self.words.min_count} times in the training's part. "
                "Lower it, or give more text."
            )
        warn_of_untaught(str(self.path), words)
        self._vocabulary = words.vocabulary
        for split in SPLITS:
            triples = Triples(words.streams[split], words.vocabulary.start, self.max_length)
            if not len(triples):
                raise ExperimentError(
                    f"{self.path}: the part for the split '{split}' has no three sentences beside each other of at "
                    f"most {self.max_length} words. Give more text, a larger share, or raise --data.max_length."
                )
            self._triples[split] = triples
            # Triples of the same lengths stay in this order, and so mix all books.
            self._orders[split] = torch.randperm(len(triples), generator=generator_of(0, "books", split))

    def _buckets(self, split: str) -> Buckets:
        like = torch.from_numpy(self._triples[split].order())
        return Buckets(like[self._orders[split]], self.batch_size, "examples")

    def _batch(self, split: str, chosen: Sequence[int], generator: torch.Generator) -> Batch:
        return self._triples[split].batch(self._orders[split][list(chosen)].tolist())
