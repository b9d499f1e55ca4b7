"""One process at a time works in a study's folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from experiments.core.errors import ExperimentError, writing


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Holds the folder, which is made. A process that inherits the file holds it too, until it ends.

    Raises: ExperimentError where another process holds it, and where it cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExperimentError(
                f"study: {folder} is in use: another process works there, or runs of one that was killed still go on. "
                "Wait for them, or give another --output."
            ) from error
        yield lock
