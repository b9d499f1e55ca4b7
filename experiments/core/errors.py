"""The one error that a user of the command line can cause."""

from collections.abc import Iterator
from contextlib import contextmanager


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
