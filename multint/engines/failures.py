"""Whose failure it is: the step's own, which is raised as the loop raises it, or ours, which is told once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

_told: set[str] = set()


class RefusedError(Exception):
    """A loop or a piece of it has no native code, for the reason that this tells."""


class StepError(Exception):
    """The step itself has raised the cause of this."""


class InternalError(Exception):
    """The engine has failed by the cause of this, which may be the caller's fault as well as its own.

    Attributes:
        keep: lets later calls know the reason, for a failure that is the engine's.
    """

    def __init__(self, keep: Callable[[str], None]) -> None:
        super().__init__()
        self.keep = keep


def report(reason: str, effect: str = "the compiled scan is not used") -> None:
    """Warn of an internal failure, once for each reason: the result is the loop's all the same."""
    warn_once(
        f"multint: {effect}, since {reason}. The results are right, and slower to come by. "
        "Please report this with the cell's step."
    )


def warn_once(message: str) -> None:
    """Warn, once for each message."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=3)
