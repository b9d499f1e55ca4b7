"""Files of a task wherever they lie below a folder, as lines of text."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from experiments.core.errors import ExperimentError
from experiments.data.books import decoded


class Lines(NamedTuple):
    """The lines of a file, without white space at their ends, and where they are from."""

    lines: list[str]
    source: str


def read_lines(
    root: Path,
    names: str | tuple[str, ...],  # of which it has any
    archive: str | None = None,  # the zip archive that it may be in, too
) -> Lines:
    """The lines of the one file of this name below the folder.

    Raises ExperimentError where there is none, or several, or it cannot be read, or is empty.
    """
    names = (names,) if isinstance(names, str) else names
    if not root.is_dir():
        raise ExperimentError(f"--data.root: there is no folder {root}. Give the one below which the data are.")
    found = sorted(path for path in root.rglob("*") if path.name in names and path.is_file())
    if len(found) > 1:
        raise ExperimentError(
            f"{root}: {found[0]} and {found[1]} are both there, expected one. Give a --data.root with one of them."
        )
    for path in found or (sorted(root.rglob(archive)) if archive else ()):
        try:
            if found:
                return _lines(path.read_bytes(), str(path))
            with zipfile.ZipFile(path) as opened:
                for member in opened.namelist():
                    if member.rpartition("/")[2] in names:
                        return _lines(opened.read(member), f"{path}/{member}")
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # RuntimeError: it is encrypted
            raise ExperimentError(f"{path}: cannot be read: {error}.") from error
    raise ExperimentError(
        f"{root}: there is no {' or '.join(names)}{f', nor {archive} with it' if archive else ''}, here or below. Give "
        "the folder of the published files by --data.root."
    )


def _lines(data: bytes, source: str) -> Lines:
    # Not by `splitlines`, for which some characters within a line end it too.
    lines = [line.strip() for line in decoded(data).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ExperimentError(f"{source}: the file is empty, expected a sentence in each line.")
    return Lines(lines, source)
