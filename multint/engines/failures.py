"""Whose failure it is: the step's own, raised as the loop raises it, or the engine's, of which `auto` warns."""

from __future__ import annotations

from collections.abc import Callable


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
