"""The one error that a user of the command line can cause."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ExperimentError(Exception):
    """A user's mistake: bad data or a bad setting.

    The message says what, got, expected and the remedy; the command line shows it without a traceback and exits with 2.
    """


@contextmanager
def building(what: str) -> Iterator[None]:
    """Makes an ExperimentError of what a constructor raises within: its arguments are the user's settings."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise ExperimentError(f"{what} cannot be built from these settings: {error}") from error


@contextmanager
def writing(path: Path, what_is_kept: str = "") -> Iterator[None]:
    """Makes an ExperimentError of a full disk, or a folder that may not be written, within."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise ExperimentError(f"{where}: cannot be written: {why}. {what_is_kept}".rstrip()) from error


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all. Raises ExperimentError where that fails; what was there then stays."""
    aside = path.with_suffix(".part")
    with writing(path):
        try:
            aside.write_text(text, encoding="utf-8", newline="")
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
