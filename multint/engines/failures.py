"""Whose failure it is: the step's own, raised as the loop raises it, or the engine's, of which `auto` warns."""

from __future__ import annotations

from typing import Any

from multint.errors import in_a_line


class RefusedError(Exception):
    """A loop or a piece of it has no native code, for the reason that this tells."""


class FailedError(Exception):
    """`fused` has failed by a cause, which may be the caller's fault as well as its own: then the loop fails too.

    Args:
        cause: what was raised.
        owner: an object that lets later calls know of a failure of the engine's, by its attribute `failure`.
    """

    what = "it failed by"

    def __init__(self, cause: BaseException, owner: Any = None) -> None:
        super().__init__(f"fused: {self.what} {in_a_line(cause)}")
        self.cause, self.owner = cause, owner


class StepError(FailedError):
    """The step has failed where it was traced."""

    what = "the step fails when it is traced:"
