"""The encoded words of a text, kept on disk: read where they are, made where not."""

import json
import math
import os
import secrets
import sys
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.text.word_encoding import INDEX, Settings, WordText, checksum, encode_held_out, encode_training
from experiments.data.text.word_sources import SPLITS, Part
from experiments.data.text.words import UNK, WordVocabulary

# The layout of a cache file: a header of so many bytes, the indices of train, valid and test, each after an `<eos>`,
# the words in order, and the checksum of all these.
_FORMAT = 2
_HEADER = 1024
_CHECKSUM = 64
_BLOCK = 1 << 20  # bytes in memory at once
_LARGE = 50_000_000  # bytes of text that take long enough for a word about it


class EncodedWords(NamedTuple):
    """The indices of a text, memory-mapped, and what they stand for."""

    vocabulary: WordVocabulary
    streams: dict[str, Tensor]  # (1 + N,) int32 of each split: `<eos>`, then its words
    unknown: dict[str, int]  # how many of each split are <unk>


def warn_of_untaught(source: str, words: EncodedWords) -> None:
    """Warn where a text has words that are `<unk>`, and the training none to learn it from."""
    for split, count in words.unknown.items():
        if count and not words.unknown["train"]:
            read = len(words.streams[split]) - 1
            warnings.warn(
                f"{source}: {count} of the {read} words of the {split} text are {UNK}, "
                "which training has none of to learn from. --data.min_count=2 makes some, of rare words.",
                stacklevel=3,
            )


def encoded(splits: dict[str, list[Part]], settings: Settings, folders: Sequence[Path]) -> EncodedWords:
    """The splits as indices, from the first of the folders that has them, or else written to the first that can be.

    A cache file is named by what it was made of: the checksum of the texts and the settings. It holds its own checksum,
    and is made anew where that is wrong. It is written aside and moved, so that processes may do so at once.
    Raises ExperimentError where the texts cannot be read, and where no folder can be written.
    """
    name = _name(settings, [checksum(splits[split]) for split in SPLITS])
    for folder in folders:
        if (found := _load(folder / name)) is not None:
            return found
    failure: OSError | None = None
    for folder in folders:
        try:
            found = _load(_build(splits, settings, folder))
        except OSError as error:
            failure = failure or error
            continue
        if found is not None:
            return found
    raise ExperimentError(
        f"the encoded words cannot be kept: {failure or 'what was written is not there any more'}. Make room, or make "
        f"one of these folders writable: {', '.join(map(str, folders))}"
    ) from failure


def _name(settings: Settings, checksums: Sequence[str]) -> str:
    return f"words-{sha256(json.dumps([_FORMAT, *settings, *checksums]).encode()).hexdigest()[:32]}.bin"


def _build(splits: dict[str, list[Part]], settings: Settings, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        with open(aside, "x+b") as file:
            checksums = _write(splits, settings, file)
        # By what was read now, which may have changed since it was looked for.
        path = folder / _name(settings, checksums)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


def _write(splits: dict[str, list[Part]], settings: Settings, file: IO[bytes]) -> list[str]:
    """Fill the file, and return the checksums of the texts that were read."""
    size = sum(part.size() for parts in splits.values() for part in parts)
    if size >= _LARGE:
        print(f"Encoding {size / 1e6:,.0f} MB of words, once: {Path(file.name).parent}", file=sys.stderr, flush=True)
    texts = {split: WordText(splits[split]) for split in SPLITS}
    file.write(bytes(_HEADER))
    counts = {}
    vocabulary, counts["train"] = encode_training(texts["train"], settings, file)
    for split in ("valid", "test"):
        counts[split] = encode_held_out(texts[split], vocabulary, file)
    words = " ".join(vocabulary.words).encode()
    file.write(words)
    header = {name: {split: getattr(counts[split], name) for split in SPLITS} for name in ("tokens", "unknown")}
    file.seek(0)
    file.write(json.dumps(header | {"words": len(words)}).encode().ljust(_HEADER))
    file.write(_checksum(file).encode())
    return [texts[split].checksum for split in SPLITS]


def _load(path: Path) -> EncodedWords | None:
    """What the file holds, or None where it is missing, cut short or damaged."""
    try:
        with open(path, "rb") as file:
            if _checksum(file, max(path.stat().st_size - _CHECKSUM, 0)) != file.read().decode("latin-1"):
                return None
            file.seek(0)
            header: dict[str, Any] = json.loads(file.read(_HEADER))
            file.seek(-header["words"] - _CHECKSUM, os.SEEK_END)
            vocabulary = WordVocabulary(file.read(header["words"]).decode().split(" "))
    except (OSError, ValueError):
        return None
    streams, place = {}, _HEADER
    for split in SPLITS:
        length = 1 + header["tokens"][split]
        streams[split] = _mapped(path, place, length)
        place += length * INDEX.itemsize
    return EncodedWords(vocabulary, streams, header["unknown"])


def _mapped(path: Path, place: int, length: int) -> Tensor:
    # "c", since torch warns of an array that may not be written; a page is copied only where it is.
    return torch.from_numpy(np.memmap(path, INDEX, "c", place, (length,)))


def _checksum(file: IO[bytes], size: float = math.inf) -> str:
    """That of the file's first bytes, where it stands after them."""
    digest = sha256()
    file.seek(0)
    while block := file.read(int(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
