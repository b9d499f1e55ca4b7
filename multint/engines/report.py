"""Telling, once, that our own machinery has failed where the caller did not ask for it."""

from __future__ import annotations

import warnings

_told: set[str] = set()


def report(reason: str) -> None:
    """Warn of an internal failure, once for each reason: the result is the loop's all the same."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"multint: the compiled scan is not used, since {reason}. The results are right, and slower to come by. "
            "Please report this with the cell's step.",
            stacklevel=2,
        )
