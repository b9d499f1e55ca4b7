"""The dense form that every bi-affine integrator has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Terms(NamedTuple):
    """The dense form of a bi-affine map: f(x, z)_o = Σ_ij z_i W[o,i,j] x_j + Σ_i U[o,i] z_i + Σ_j V[o,j] x_j + b_o.

    Source: Jayakumar et al. 2020, written per output.
    """

    W: Tensor  # (O, Z, X)
    U: Tensor  # (O, Z)
    V: Tensor  # (O, X)
    b: Tensor  # (O,)

    def __call__(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        """Evaluate the dense form; the oracle of every integrator's test, not a fast path."""
        return torch.einsum("...i,oij,...j->...o", z, self.W, x) + z @ self.U.T + x @ self.V.T + self.b

    def __add__(self, other: Terms) -> Terms:  # type: ignore[override]
        """Add term by term (not a tuple's concatenation)."""
        return Terms(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))

    def scaled(self, scale: float) -> Terms:
        """Multiply every term by a number."""
        return Terms(*(scale * term for term in self))


def bias_term(bias: nn.Parameter | None, like: Tensor) -> Tensor:
    """The dense form's b: the bias, or zeros (O,) where there is none."""
    return like.new_zeros(like.shape[0]) if bias is None else bias
