"""Initialisation: the variances that make a contraction of unit-variance streams come out with unit variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from multint.integrators.vectors import add_bias

LARGEST_VARIANCE = 1e4  # where a term is told to start almost at 0, its matrices need not make up for it


class Projection(nn.Linear):
    """A product with a matrix (O, I) and no bias, so that the bias joins the pointwise code that follows.

    Args:
        stream: which of an integrator's streams enters by the matrix: "x", "z", "xz", or "" for something between.
        variance: that of the outputs on a unit-variance input.
    """

    def __init__(self, stream: str, in_features: int, out_features: int, variance: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias=False)
        fill(self.weight, variance / in_features)
        self.x_weights = ("weight",) if "x" in stream else ()
        self.z_weights = ("weight",) if "z" in stream else ()

    def plus(
        self,
        stream: Tensor,  # (..., I)
        bias: nn.Parameter | None,  # (O,)
    ) -> Tensor:  # (..., O)
        """The product and a bias that its owner has, in one kernel unless a hook acts on the product itself."""
        if bias is None or self._forward_hooks or self._forward_pre_hooks:
            return add_bias(self(stream), bias)
        return functional.linear(stream, self.weight, bias)


def fill(weight: Tensor, variance: float) -> None:
    """Fill in place with independent uniform draws of mean 0 and the given variance."""
    bound = math.sqrt(3.0 * variance)
    with torch.no_grad():
        weight.uniform_(-bound, bound)


def share(*present: bool) -> float:
    """The variance of each of the terms that are present, for a sum of unit variance."""
    return 1.0 / max(1, sum(present))


def quadratic_root(a: float, b: float) -> float:
    """The v > 0 with a·v² + b·v = 1, for a, b ≥ 0; 1 where both are 0, and at most `LARGEST_VARIANCE`."""
    if a == b == 0:
        return 1.0
    # The textbook's form with a in the denominator loses its digits as a → 0.
    return min(2.0 / (b + math.sqrt(b * b + 4 * a)), LARGEST_VARIANCE)
