"""Initialisation: the variances that make a contraction of unit-variance streams come out with unit variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from multint.errors import OptionError

LARGEST_VARIANCE = 1e4  # where a term is told to start almost at 0, its matrices need not make up for it


def fill(weight: Tensor, variance: float) -> None:
    """Fill in place with independent uniform draws of mean 0 and the given variance."""
    bound = math.sqrt(3.0 * variance)
    with torch.no_grad():
        weight.uniform_(-bound, bound)


def projection(in_features: int, out_features: int, variance: float = 1.0) -> nn.Linear:
    """A product with a matrix (O, X) and no bias, whose outputs have the given variance on a unit-variance stream.

    Matrices are `nn.Linear` without a bias so that the bias joins the pointwise code that follows.
    """
    linear = nn.Linear(in_features, out_features, bias=False)
    fill(linear.weight, variance / in_features)
    return linear


def vector(owner: nn.Module, name: str, initial: float | None, features: int) -> nn.Parameter | None:
    """A learnt vector that starts at `initial` everywhere, or None where the term is left out.

    Raises: OptionError where `initial` is not a number; a bool is refused, since True would quietly mean 1.0.
    """
    if initial is None:
        return None
    if isinstance(initial, bool) or not isinstance(initial, int | float) or not math.isfinite(initial):
        raise OptionError(
            f"{type(owner).__name__}: {name} is {initial!r}, expected the number that the vector starts at, "
            "or None to leave it out"
        )
    return nn.Parameter(torch.full((features,), float(initial)))


def share(*present: bool) -> float:
    """The variance of each of the terms that are present, for a sum of unit variance."""
    return 1.0 / max(1, sum(present))


def quadratic_root(a: float, b: float) -> float:
    """The v > 0 with a·v² + b·v = 1, for a, b ≥ 0; 1 where both are 0, and at most `LARGEST_VARIANCE`."""
    if a == b == 0:
        return 1.0
    # The textbook's form with a in the denominator loses its digits as a → 0.
    return min(2.0 / (b + math.sqrt(b * b + 4 * a)), LARGEST_VARIANCE)
