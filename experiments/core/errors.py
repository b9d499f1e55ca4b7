"""The one error that a user of the command line can cause, and what its messages share."""

import io
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_OF_LIGHTNING = "MisconfigurationException"


class ExperimentError(Exception):
    """A user's mistake: bad data or a bad setting.

    The message says what, got, expected and the remedy; the command line shows it without a traceback and exits with 2.
    """


class WritingError(ExperimentError):
    """What a full disk, or a folder that may not be written, makes of a run."""


class DivergedError(ExperimentError):
    """The end of a run whose loss became no finite number. It is reported, and the command exits with 1."""


@contextmanager
def building(what: str) -> Iterator[None]:
    """Makes an ExperimentError of what a constructor raises within: its arguments are the user's settings."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, ImportError) as error:  # ImportError: of a package it needs
        # jsonargparse wraps what a constructor says in several lines of its own.
        if error.__cause__ is not None and (own := mistake_in(error.__cause__)):
            raise ExperimentError(str(own)) from error
        raise ExperimentError(f"{what} cannot be built from these settings: {_reason(str(error))}") from error


def _reason(message: str) -> str:
    """The first line of an error, since torch adds its own stack.

    Of what jsonargparse says where it may be one of several types, the reason of the one that was meant.
    """
    first_line, _, rest = message.partition("\n")
    if not first_line.startswith("Does not validate against any of the Union"):
        return first_line
    reasons = rest.partition("Errors:\n  - ")[2].partition("\nGiven value")[0].split("\n  - ")
    of_class = [reason for reason in reasons if reason.startswith("Problem with given class_path")]
    others = [reason for reason in reasons if not reason.startswith(("Expected a ", "Not a valid", "Import path"))]
    return " ".join([*of_class, *others, *reasons][0].split())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a WritingError of what the system says within."""
    try:
        yield
    except OSError as error:
        raise WritingError(f"{path}: cannot be written: {error.strerror or error}.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside the path to write to, and moves what was written there to the path at the end.

    So a file is written as a whole or not at all: where writing fails, what was there stays. A link at the path is
    replaced, and what it leads to stays.
    Raises WritingError for what the system says within, and for a path that is there but no file.
    """
    with writing(path):
        if path.exists() and not path.is_file():  # a device must not be replaced
            raise WritingError(f"{path}: cannot be written: it is there, and no file.")
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            yield aside
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file, by a second name for it where that goes. Raises WritingError as `replacing` does."""
    with replacing(target) as aside:
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)  # no second write, and no second copy's room
        except OSError:
            shutil.copyfile(source, aside)


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises WritingError as `replacing` does."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="")


def write_figure(path: Path, figure: "Figure", **settings: Any) -> None:
    """Write a picture, of the kind that the path's suffix says; the settings are those of `savefig`.

    Raises WritingError as `replacing` does.
    """
    content = io.BytesIO()  # whose failures to be written are not matplotlib's errors
    figure.savefig(content, format=path.suffix.removeprefix("."), **settings)
    with replacing(path) as aside:
        aside.write_bytes(content.getvalue())


def mistake_in(error: BaseException) -> Exception | None:
    """The first exception in the chain that stands for a user's mistake: ours, the library's or Lightning's."""
    # Looked up, since importing Lightning takes seconds: what was not imported has raised nothing.
    kinds = [ExperimentError]
    for module, name in (("multint", "MultintError"), ("lightning.pytorch.utilities.exceptions", _OF_LIGHTNING)):
        kinds += [getattr(sys.modules[module], name)] if module in sys.modules else []
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, tuple(kinds)):
            return link
        link = link.__cause__ or link.__context__
    return None


def choices_message(given: str, choices: Iterable[str]) -> str:
    """The nearest of the choices, and all of them."""
    choices = list(choices)
    nearest = nearest_message(given, choices) or "."
    return f"{nearest} Choices: {', '.join(choices)}" if choices else ""


def nearest_message(given: str, choices: Iterable[str]) -> str:
    """The nearest of the choices, if there is one."""
    nearest = get_close_matches(given, choices, n=1, cutoff=0.5)
    return f". Did you mean '{nearest[0]}'?" if nearest else ""
