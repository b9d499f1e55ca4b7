"""The words of the sentences of some files, kept on disk: read where they are, made where not.

A file for each split has a sentence a line, its words with spaces between them, and an empty line after each document.
It is what `experiments.data.text.word_cache` turns into numbers.
"""

import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.core.errors import ExperimentError
from experiments.data.books import read_book, works
from experiments.data.sentences.splitting import PARAGRAPH_END, sentences_of, words_of
from experiments.data.text.word_encoding import checksum
from experiments.data.text.word_sources import SPLITS, Part

Layout = Literal["prose", "lines"]

_FORMAT = 2  # of the files and of the rules in `splitting`: change either, and count it up
_LARGE = 50_000_000  # bytes of text that take long enough for a word about it
_CHECKSUMS = "checksums.json"
_LINE_END = re.compile("\n")


class Reading(NamedTuple):
    """How files are read as sentences."""

    layout: Layout
    encoding: str | None  # see `read_book`
    valid: float  # the share of each document that is held out for validation, at the end but for that of the test
    test: float  # and for the test, at its end


def read_sentences(text: str, layout: Layout) -> Iterator[str]:
    """The sentences of a text: those of prose, or its lines, of which some may be empty."""
    if layout == "prose":
        return sentences_of(text)
    return (line[0].removesuffix("\n") for line in re.finditer(r"[^\n]*\n|[^\n]+", text))


def split_into_words(files: Sequence[Path], reading: Reading, folders: Sequence[Path]) -> dict[str, list[Part]]:
    """The words of each split, from the first of the folders that has them, or else written to the first that can be.

    They lie in a folder named by the checksum of the files and of how they are read, with checksums of their own; where
    these are wrong they are made anew.
    Raises ExperimentError where the files cannot be read, and where no folder can be written.
    """
    key = _checksum(files, reading)
    name = f"sentences-{key[:32]}"
    for folder in folders:
        if (found := _found(folder / name)) is not None:
            return found
    failure: OSError | None = None
    for folder in folders:
        try:
            _write(files, reading, key, folder / name)
        except OSError as error:
            failure = failure or error
        # Whoever wrote it: another process may have been quicker.
        if (found := _found(folder / name)) is not None:
            return found
    raise ExperimentError(
        f"the words of the sentences cannot be kept: {failure or 'what was written is not there any more'}. Make room, "
        f"or make one of these folders writable: {', '.join(map(str, folders))}"
    ) from failure


def _checksum(files: Iterable[Path], reading: Reading) -> str:
    digest = sha256(json.dumps([_FORMAT, *reading]).encode())
    for file in files:
        digest.update(checksum([Part(file)]).encode())
    return digest.hexdigest()


def _found(folder: Path) -> dict[str, list[Part]] | None:
    parts = {split: [Part(folder / split)] for split in SPLITS}
    try:
        saved = json.loads((folder / _CHECKSUMS).read_text())
        return parts if saved == {split: checksum(parts[split]) for split in SPLITS} else None
    except (OSError, ValueError, ExperimentError):
        return None


def _write(files: Sequence[Path], reading: Reading, key: str, folder: Path) -> None:
    size = sum(file.stat().st_size for file in files)
    if size >= _LARGE:
        print(f"Splitting {size / 1e6:,.0f} MB into sentences, once: {folder}", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        aside.mkdir()
        outputs = {split: open(aside / split, "w", encoding="utf-8", newline="") for split in SPLITS}  # noqa: SIM115
        try:
            for file in files:
                for work in works(read_book(file, reading.encoding)):
                    for split, text in cut(work, reading):
                        lines = (" ".join(words_of(sentence)) for sentence in read_sentences(text, reading.layout))
                        outputs[split].writelines(f"{line}\n" for line in lines)
                        outputs[split].write("\n")
        finally:
            for output in outputs.values():
                output.close()
        if _checksum(files, reading) != key:
            raise ExperimentError(f"{files[0].parent}: a text was changed while it was read. Start again.")
        sums = {split: checksum([Part(aside / split)]) for split in SPLITS}
        (aside / _CHECKSUMS).write_text(json.dumps(sums))
        if _found(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # it is damaged
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def cut(document: str, reading: Reading) -> list[tuple[str, str]]:
    """The parts of a document by split, cut where a paragraph ends, or else a line, as of lines always."""
    ends = (PARAGRAPH_END, _LINE_END) if reading.layout == "prose" else (_LINE_END,)
    cuts = [0]
    for held_out in (reading.valid + reading.test, reading.test):
        least = len(document) - round(held_out * len(document))
        places = (found.start() for end in ends if (found := end.search(document, least)))
        cuts.append(max(cuts[-1], next(places, len(document))))
    return [(split, document[a:b]) for split, a, b in zip(SPLITS, cuts, [*cuts[1:], len(document)], strict=True)]
