"""Where the words of a text lie: the user's own files, and named corpora."""

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, NamedTuple

from experiments.core.errors import ExperimentError
from experiments.data.downloads import KnownFile
from experiments.data.text.corpora import PTB

WordCorpus = Literal["ptb-words", "wikitext-2", "wikitext-103"]

SPLITS = ("train", "valid", "test")

_WIKITEXT_URL = "https://wikitext.smerity.com/"
WIKITEXT = {
    "wikitext-2": KnownFile(
        "wikitext-2",
        "wikitext-2-v1.zip",
        "sha256:92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
        _WIKITEXT_URL + "wikitext-2-v1.zip",
    ),
    "wikitext-103": KnownFile(
        "wikitext-103",
        "wikitext-103-v1.zip",
        "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        _WIKITEXT_URL + "wikitext-103-v1.zip",
    ),
}
# The published numbers of tokens, one <eos> for each line among them. WikiText's two have the same held-out articles.
TOKENS = {
    "ptb-words": {"train": 929_589, "valid": 73_760, "test": 82_430},
    "wikitext-2": {"train": 2_088_628, "valid": 217_646, "test": 245_569},
    "wikitext-103": {"train": 103_227_021, "valid": 217_646, "test": 245_569},
}

_BLOCK = 1 << 20  # bytes in memory at once
_LONGEST_LINE = 1 << 16  # where the end of a line is looked for, to cut a text there

# How the files of a split are called: ptb.train.txt, wiki.valid.tokens, test.txt, val.txt, …
_ROLES = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
_SUFFIXES = {".txt", ".tokens", ".raw", ""}


class Part(NamedTuple):
    """Bytes start … stop - 1 of a file, or of a member of a zip archive; all that follow where stop is None."""

    path: Path
    member: str | None = None
    start: int = 0
    stop: int | None = None

    def blocks(self) -> Iterator[bytes]:
        """The bytes in order. Raises ExperimentError where they cannot be read."""
        with _reading(self.path), self._opened() as file:
            file.seek(self.start)
            left = _BLOCK if self.stop is None else self.stop - self.start
            while block := file.read(min(_BLOCK, left)):
                left -= 0 if self.stop is None else len(block)
                yield block

    def size(self) -> int:
        """The number of bytes."""
        if self.stop is not None:
            return self.stop - self.start
        with _reading(self.path), self._opened() as file:
            return file.seek(0, 2) - self.start

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        if self.member is None:
            with open(self.path, "rb") as file:
                yield file
        else:
            with zipfile.ZipFile(self.path) as archive:
                if self.member not in archive.namelist():
                    raise ExperimentError(f"{self.path}: the archive holds no {self.member}. Remove it.")
                with archive.open(self.member) as file:
                    yield file


class Source(NamedTuple):
    """The parts that each split is read from, in order."""

    splits: dict[str, list[Part]]
    folder: Path  # that the text lies in
    is_cut: bool = False  # by fractions, where the text has no split of its own


def named(corpus: WordCorpus, root: Path) -> Source:
    """A corpus on disk, downloaded to `root` where missing.

    WikiText is taken from its archive, or from the three files in it: `root/NAME/wiki.train.tokens` or
    `root/wiki.train.tokens`, …. Raises ExperimentError where a download fails or a file is not the published one.
    """
    if corpus == "ptb-words":
        paths = dict(zip(SPLITS, (file.fetch(root) for file in PTB), strict=True))
        return Source({split: [Part(path)] for split, path in paths.items()}, paths["train"].parent)
    for folder in (root / corpus, root):
        paths = {split: folder / f"wiki.{split}.tokens" for split in SPLITS}
        if all(path.is_file() for path in paths.values()):
            return Source({split: [Part(path)] for split, path in paths.items()}, folder)
    archive = WIKITEXT[corpus].fetch(root)
    members = {split: [Part(archive, f"{corpus}/wiki.{split}.tokens")] for split in SPLITS}
    return Source(members, archive.parent)


def at(path: Path, valid: float, test: float) -> Source:
    """The user's own text: a file, a directory of `*.txt` files, or one of three files that are its splits.

    The names of these are alike but for the words train, valid (or val, validation, dev) and test. Any other text is
    cut at ends of lines: `valid` and `test` are fractions of its bytes.
    Raises ExperimentError where there is no text, or the files of a split are not complete.
    """
    if not path.is_dir():
        with _reading(path), open(path, "rb"):
            return Source(_cut([path], valid, test), path.parent, is_cut=True)
    with _reading(path):
        splits = _found_splits(path)
        paths = sorted(p for p in path.rglob("*.txt") if p.is_file())
    if splits:
        return Source({split: [Part(file)] for split, file in splits.items()}, path)
    if not paths:
        raise ExperimentError(f"{path}: the directory holds no *.txt file. Give a text file, or rename yours.")
    return Source(_cut(paths, valid, test), path, is_cut=True)


def _found_splits(folder: Path) -> dict[str, Path]:
    """The files of the directory that are a split, or none where no file is named as a part of one."""
    families: dict[str, dict[str, list[Path]]] = {}  # by what the names share
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _SUFFIXES):
        words = re.split(r"([._-])", path.name)
        roles = [i for i, word in enumerate(words) if word.lower() in _ROLES]
        if len(roles) == 1:
            [i] = roles
            family = families.setdefault("".join([*words[:i], "*", *words[i + 1 :]]), {})
            family.setdefault(_ROLES[words[i].lower()], []).append(path)
    complete = {name: family for name, family in families.items() if len(family) == len(SPLITS)}
    if len(complete) > 1 or any(len(paths) > 1 for family in complete.values() for paths in family.values()):
        names = [path.name for family in complete.values() for paths in family.values() for path in paths]
        raise ExperimentError(f"{folder}: more than one split: {', '.join(names)}. Give a directory with one of them.")
    if families and not complete:
        name, family = max(families.items(), key=lambda item: len(item[1]))
        missing = ", ".join(name.replace("*", split) for split in SPLITS if split not in family)
        there = ", ".join(path.name for paths in family.values() for path in paths)
        raise ExperimentError(
            f"{folder}: {there} is a part of a split by its name, but there is no {missing}. Add what is missing, "
            "rename what is no such part, or give one file, of which --data.valid and --data.test are held out."
        )
    return {split: family[split][0] for family in complete.values() for split in SPLITS}


def _cut(paths: Sequence[Path], valid: float, test: float) -> dict[str, list[Part]]:
    """The files one after the other, cut into train | valid | test."""
    starts = [0]
    for path in paths:
        with _reading(path):
            starts.append(starts[-1] + path.stat().st_size)
    files = list(zip(paths, starts[:-1], starts[1:], strict=True))
    size = starts[-1]
    first, second = (_end_of_line(files, size - round(size * held_out)) for held_out in (valid + test, test))
    return {
        split: [
            Part(path, None, max(begin - start, 0), min(end, stop) - start)
            for path, start, stop in files
            if max(begin, start) < min(end, stop)
        ]
        for split, begin, end in (("train", 0, first), ("valid", first, second), ("test", second, size))
    }


def _end_of_line(files: Sequence[tuple[Path, int, int]], place: int) -> int:
    """The first place from here on where a line ends; in a text without lines, where a word does."""
    for path, start, stop in files:
        if start < place < stop:
            with _reading(path), open(path, "rb") as file:
                file.seek(place - start - 1)
                ahead = file.readline(_LONGEST_LINE)
            end = len(ahead) if ahead.endswith(b"\n") else ahead.find(b" ") + 1
            return place - 1 + end if end else stop
    return place


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ExperimentError(f"{path}: no such file or directory. Check --data.path.") from error
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror or error}. Check --data.path.") from error
