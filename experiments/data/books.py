"""Books as they are published in plain text: their files, and their works without what Project Gutenberg adds."""

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from experiments.core.errors import ExperimentError

# Project Gutenberg's own text of before 2003, before a work or behind it. The longest has 15,000 characters.
_OLD_LICENCE = re.compile(r"^[^\n]*Project Gutenberg(?:.{0,20000}?^\*END\b[^\n]*$|[^\n]*$)", re.MULTILINE | re.DOTALL)
# And of today: all up to "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***", and all from "*** END OF THE …" on.
_MARKER = r"^\*\*\* ?{} OF TH(?:E|IS) PROJECT GUTENBERG E[^\n]*"
_START = re.compile(_MARKER.format("START"), re.MULTILINE)
_LICENCE = re.compile(rf"(?:\A|{_MARKER.format('END')}).*?(?:{_MARKER.format('START')}|\Z)", re.MULTILINE | re.DOTALL)


def book_files(path: Path, books: Sequence[str] | None) -> list[Path]:
    """The file, or the `.txt` and `.zip` files of a folder, with those of its folders, or the ones of these names.

    Raises ExperimentError for names that are not there, and for a folder without such files.
    """
    if not path.is_dir():
        if books is not None:
            raise ExperimentError(
                f"--data.books: got names, and {path} is no folder of them. Give one, or --data.books=null."
            )
        return [path]
    there = {name: file for file in sorted(path.rglob("*")) if (name := _name(file, path)) and file.is_file()}
    if missing := [book for book in books or () if book not in there]:
        raise ExperimentError(
            f"--data.books: there is no {missing[0]} in {path}. Choices: {', '.join(there) or 'none'}."
        )
    if not there:
        raise ExperimentError(f"{path}: the folder has no .txt and no .zip, expected a text.")
    return [there[book] for book in books or there]


def _name(file: Path, folder: Path) -> str:
    """Its path below the folder; "" for one that is no text, or is hidden."""
    path = file.relative_to(folder)
    is_text = path.suffix in (".txt", ".zip") and not any(part.startswith(".") for part in path.parts)
    return path.as_posix() if is_text else ""


def check_encoding(encoding: str) -> str:
    """The encoding, if Python knows it. Raises ExperimentError."""
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ExperimentError(f"encoding: got {encoding!r}, expected one that Python knows.") from error
    return encoding


def decoded(data: bytes) -> str:
    """Text in UTF-8, or else in Windows' Latin encoding, as the older corpora are."""
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")  # which has a character for each byte


def read_book(path: Path, encoding: str | None) -> str:
    """The text of a file, or of the one file in an archive, lines ending in \\n; of no encoding given as `decoded`.

    Raises ExperimentError where there is none.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                [inside] = archive.namelist()
                data = archive.read(inside)
        text = decoded(data) if encoding is None else data.decode(encoding)
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror}. Check its path.") from error
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path}: no text in {encoding} ({error}). Name its encoding.") from error
    except (ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # RuntimeError: it is encrypted
        raise ExperimentError(f"{path}: no archive of one text ({error}).") from error
    if not text.strip():
        raise ExperimentError(f"{path}: the file is empty, expected a text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def works(text: str) -> list[str]:
    """The works in a text: what stands before, between and behind Project Gutenberg's licences."""
    parts = _LICENCE.split(text) if _START.search(text) else [text]
    found = [work for part in parts for work in _OLD_LICENCE.split(part)]
    return [work for work in found if any(map(str.isalnum, work))]
