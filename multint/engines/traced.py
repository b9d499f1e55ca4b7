"""The scan in an exported program: the loop unrolled, or one operator of free length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multint.engines import private
from multint.engines.loop import loop
from multint.errors import EngineError


def traced(cell: Any, xs: Any, state: Any) -> tuple[Tensor, Any]:
    """The loop's result, by operations that a program can hold.

    A fixed length is unrolled. One that `torch.export` is told to leave free becomes torch's operator `scan`, in its
    default, non-strict mode.

    Raises: EngineError for a step that the operator cannot hold.
    """
    steps = (next(iter(xs.values())) if isinstance(xs, dict) else xs).shape[0]
    if not private.is_free(steps):
        return loop(cell, xs, state)
    try:
        return private.scan_operator(cell.step, xs, state)
    except Exception as error:
        raise EngineError(
            "scan: the step cannot be exported with a free length, expected one that is fixed, or a step that torch's "
            f"operator `scan` takes: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What an error of torch's tracer says, without its advice and its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    explained = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    return explained[0] if explained else lines[0]
