"""The data of a word language model."""

from collections.abc import Mapping
from pathlib import Path

import pooch

from experiments.core.errors import ExperimentError
from experiments.data.text import word_sources
from experiments.data.text.stream_data import HELD_OUT, Encoded, StreamData, warn_of_idle
from experiments.data.text.word_cache import EncodedWords, encoded, warn_of_untaught
from experiments.data.text.word_encoding import Settings
from experiments.data.text.word_sources import SPLITS, Source, WordCorpus

# Beside the text that was encoded.
_CACHE = ".multint-cache"


class WordData(StreamData):
    """A text's words, named or from disk, as windows over parallel contiguous streams.

    White space separates words, and `<eos>` ends each line, empty lines too: so the published results count. The first
    word is predicted from an `<eos>` before it, so that with one stream every word of a text is predicted once. The
    vocabulary is that of the training text alone, in the order of falling counts. `<eos>` and `<unk>` are always in it,
    whether or not the text has them; a word outside it is `<unk>`.

    The text is encoded once, in one pass and little memory, into a file beside it (`.multint-cache`, or the user's
    cache folder where none can be written there), which is found by the text's checksum and memory-mapped.

    Raises ExperimentError at construction for a setting out of range, and in `prepare_data` and `setup` for a text that
    cannot be used.

    Args:
        corpus: The named text, downloaded if it is not below `root`.
        path: A text file in UTF-8, or a directory. Three files of it whose names differ by train, valid and test, as
            `wiki.train.tokens`, are its split. Else all `*.txt` files are joined in the order of their paths.
            Overrides `corpus`.
        max_vocabulary: The entries of the vocabulary at most; the most frequent words stay. None: all.
        min_count: The times that a word must occur in the training text to be in the vocabulary.
        valid: The fraction held out for validation, for a path without a split: train | valid | test.
        test: The fraction held out for test, at the end.
        root: The folder of the named corpora, searched as `root/NAME/FILE` and `root/FILE`; downloads go to the former.
            None: the user's cache folder for multint.
        batch_size: Parallel streams in training, shared out among the processes where there are several.
        length: Words in a training window.
        eval_batch_size: Parallel streams in evaluation; 1 reads the text as it is, from start to end.
        eval_length: Words in an evaluation window; results do not depend on it where the state is carried.
    """

    symbols = "words"
    published = {"ptb-words": 10_000, "wikitext-2": 33_278, "wikitext-103": 267_735}  # noqa: RUF012

    def __init__(
        self,
        corpus: WordCorpus = "ptb-words",
        path: str | None = None,
        max_vocabulary: int | None = None,
        min_count: int = 1,
        valid: float = HELD_OUT,
        test: float = HELD_OUT,
        root: str | None = None,
        batch_size: int = 32,
        length: int = 50,
        eval_batch_size: int = 1,
        eval_length: int = 500,
    ) -> None:
        super().__init__(corpus, path, valid, test, root, batch_size, length, eval_batch_size, eval_length)
        if max_vocabulary is not None and max_vocabulary < 3:
            raise ExperimentError(
                f"--data.max_vocabulary: got {max_vocabulary}, expected at least 3: <unk>, <eos> and a word."
            )
        if min_count < 1:
            raise ExperimentError(f"--data.min_count: got {min_count}, expected at least 1.")
        self.corpus: WordCorpus = corpus
        self.settings = Settings(max_vocabulary, min_count)
        self._are_fractions_set = (valid, test) != (HELD_OUT, HELD_OUT)
        self._prepared: tuple[Source, EncodedWords] | None = None
        warn_of_idle(
            "--data.path" if path is not None else f"the corpus {corpus}",
            {
                "--data.root": root is not None and path is not None,
                "--data.valid, --data.test": self._are_fractions_set and path is None,
            },
        )

    def prepare_data(self) -> None:
        """Downloads the corpus if it is not on disk, and encodes it. Raises ExperimentError where that fails."""
        self._prepared = self._read()

    def _encoded(self) -> Encoded:
        # Of several processes one prepares the data, and the others find its file here.
        source, words = self._prepared or self._read()
        self._prepared = None
        self._check(source, words)
        if self.path is not None and not source.is_cut:
            warn_of_idle("a directory that holds a split", {"--data.valid, --data.test": self._are_fractions_set})
        warn_of_untaught(str(self.source), words)
        return Encoded(words.vocabulary, words.streams, source.is_cut)

    def _read(self) -> tuple[Source, EncodedWords]:
        if self.path is None:
            source = word_sources.named(self.corpus, self.root)
        else:
            source = word_sources.at(Path(self.path).expanduser(), self.valid, self.test)
        folders = [source.folder / _CACHE, Path(pooch.os_cache("multint")) / "words"]
        return source, encoded(source.splits, self.settings, folders)

    def _check(self, source: Source, words: EncodedWords) -> None:
        if len(words.vocabulary) == 2:
            why = "Give a text with words by --data.path."
            if self.settings.min_count > 1:
                why = (
                    f"No word occurs --data.min_count={self.settings.min_count} times: lower it, or give a longer text."
                )
            raise ExperimentError(f"{self.source}: the training text is empty, expected words. {why}")
        got = {split: len(stream) - 1 for split, stream in words.streams.items()}
        if self.path is None and got != word_sources.TOKENS[self.corpus]:
            raise ExperimentError(
                f"{source.folder}: this is not the published {self.corpus}: its splits have {_listed(got)} words, "
                f"expected {_listed(word_sources.TOKENS[self.corpus])}. Remove its files or put the published ones in "
                "their place; give a text of your own by --data.path."
            )


def _listed(counts: Mapping[str, int]) -> str:
    return " / ".join(f"{counts[split]:,}" for split in SPLITS)
