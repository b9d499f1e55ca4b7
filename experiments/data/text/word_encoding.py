"""Words to indices, in one pass over a text of any size."""

from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import repeat
from typing import IO, NamedTuple

import numpy as np

from experiments.core.errors import ExperimentError
from experiments.data.text.word_sources import Part
from experiments.data.text.words import EOS, UNK, WordVocabulary

INDEX = np.dtype("<i4")
_CHUNK = 1 << 20  # indices in memory at once


class Settings(NamedTuple):
    """Which words of the training text are in the vocabulary; the others are `<unk>`."""

    max_vocabulary: int | None  # entries at most, <unk> and <eos> among them; the most frequent stay
    min_count: int  # times that a word occurs, at least


class WordText:
    """The words of some files, in blocks: white space separates them, and `<eos>` ends each line, empty ones too.

    A byte order mark at the start of a file is left out.

    Raises ExperimentError for bytes that are not UTF-8.
    """

    def __init__(
        self,
        parts: Sequence[Part],
    ) -> None:
        self._parts = parts
        self._read: list[str] = []  # the checksum of each part that was read

    def __iter__(self) -> Iterator[list[str]]:
        for part in self._parts:
            yield from self._words(part)

    @property
    def checksum(self) -> str:
        """That of the bytes that the words were made of, as `checksum(parts)` has it for those on disk."""
        return _joined(self._read)

    def _words(self, part: Part) -> Iterator[list[str]]:
        rest, place, digest = b"", part.start, sha256()
        for block in part.blocks():
            digest.update(block)
            block = rest + block
            # No character, no word and no \r\n is cut in two.
            cut = max(block.rfind(b" "), block.rfind(b"\n")) + 1
            yield _split(block[:cut], part, place)
            rest, place = block[cut:], place + cut
            last = block[-1:]
        self._read.append(digest.hexdigest())
        if place + len(rest) > part.start and (place > 0 or rest != BOM_UTF8):
            yield _split(rest, part, place)
            if last not in b"\r\n":
                yield [EOS]


def checksum(parts: Sequence[Part]) -> str:
    """That of the parts' bytes and of where one ends and the next begins."""
    digests = []
    for part in parts:
        digest = sha256()
        for block in part.blocks():
            digest.update(block)
        digests.append(digest.hexdigest())
    return _joined(digests)


class Counts(NamedTuple):
    """What was written of a text."""

    tokens: int
    unknown: int  # those that are <unk>


def encode_training(text: WordText, settings: Settings, file: IO[bytes]) -> tuple[WordVocabulary, Counts]:
    """Write `<eos>` and the training text's indices to the file, from where it stands on, and make the vocabulary.

    The first `<eos>` is what a network reads to predict the first word; it is not counted. The vocabulary is in the
    order of falling counts, equal ones by the word. `<unk>` and `<eos>` are always in it. The words get preliminary
    indices as they appear, which are replaced in the file once all are counted.
    """
    begin = file.tell()
    index: defaultdict[str, int] = defaultdict()
    index.default_factory = index.__len__  # a new word gets the next index
    index[EOS], index[UNK] = 0, 1
    file.write(np.zeros(1, INDEX))
    counts = np.zeros(len(index), np.int64)
    for words in text:
        ids = np.fromiter(map(index.__getitem__, words), INDEX, len(words))
        file.write(ids)
        more = np.bincount(ids, minlength=len(index))
        more[: len(counts)] += counts
        counts = more
    words, final = _chosen(list(index), counts, settings)
    vocabulary, tokens = WordVocabulary(words), int(counts.sum())
    _replace(file, begin, 1 + tokens, final)
    return vocabulary, Counts(tokens, int(counts[final == vocabulary.unknown].sum()))


def encode_held_out(text: WordText, vocabulary: WordVocabulary, file: IO[bytes]) -> Counts:
    """Write `<eos>` and the text's indices to the file, from where it stands on."""
    file.write(np.array([vocabulary.start], INDEX))
    index = {word: i for i, word in enumerate(vocabulary.words)}
    tokens = unknown = 0
    for words in text:
        ids = np.fromiter(map(index.get, words, repeat(vocabulary.unknown)), INDEX, len(words))
        file.write(ids)
        tokens += len(ids)
        unknown += int((ids == vocabulary.unknown).sum())
    return Counts(tokens, unknown)


def _split(block: bytes, part: Part, place: int) -> list[str]:
    if place == 0 and block.startswith(BOM_UTF8):
        block, place = block.removeprefix(BOM_UTF8), len(BOM_UTF8)
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{part.path}" + (f", {part.member}" if part.member else "")
        raise ExperimentError(
            f"{where}: byte 0x{block[error.start]:02x} at offset {place + error.start} is not UTF-8, expected words. "
            "Convert the file to UTF-8."
        ) from error
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\n", f" {EOS} ").split()


def _chosen(words: Sequence[str], counts: np.ndarray, settings: Settings) -> tuple[list[str], np.ndarray]:
    """The vocabulary, and the index in it of each of these words; the first two are `<eos>` and `<unk>`."""

    def by_count(indices: Sequence[int]) -> list[int]:
        return sorted(indices, key=lambda i: (-counts[i], words[i]))

    kept = by_count([i for i in range(2, len(words)) if counts[i] >= settings.min_count])
    if settings.max_vocabulary is not None:
        kept = kept[: settings.max_vocabulary - 2]
    unknown = counts[1] + counts[2:].sum() - counts[kept].sum()
    counts = np.concatenate([counts[:1], [unknown], counts[2:]])
    order = by_count([0, 1, *kept])
    final = np.full(len(words), order.index(1), INDEX)
    final[order] = np.arange(len(order))
    return [words[i] for i in order], final


def _replace(file: IO[bytes], begin: int, count: int, final: np.ndarray) -> None:
    """Replace `count` indices of the file by what `final` has for them."""
    for start in range(0, count, _CHUNK):
        place = begin + start * INDEX.itemsize
        file.seek(place)
        ids = np.frombuffer(file.read(min(_CHUNK, count - start) * INDEX.itemsize), INDEX)
        file.seek(place)
        file.write(final[ids])
    file.seek(begin + count * INDEX.itemsize)


def _joined(digests: Sequence[str]) -> str:
    return sha256(" ".join(digests).encode()).hexdigest()
