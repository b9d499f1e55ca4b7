"""Corpora that are read as they are shipped: in one archive."""

import lzma
import tarfile
import zlib
from pathlib import Path

from experiments.core.errors import ExperimentError


def read_archive(path: Path) -> dict[str, bytes]:
    """The files in a tar archive, of whatever compression, by their paths below its one folder.

    Raises ExperimentError for a file that is none, or a truncated one.
    """
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if (file := archive.extractfile(member)) is not None:
                    files[member.name.removeprefix("./").partition("/")[2]] = file.read()
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise ExperimentError(f"{path}: no archive that can be read: {error}.") from error
    return files
