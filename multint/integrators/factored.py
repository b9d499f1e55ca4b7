"""Bilinear forms whose tensor is factored: far fewer parameters for the same kind of meeting.

A rank that is not given follows from the sizes: the interaction has at most as many numbers as U (O, Z) and V (O, X)
have together. Named without a rank, a form so costs about twice what an `Additive` of the same sizes does, and does not
explode with them as `Bilinear` does. The rank that a task wants is still to be searched for.
"""

from __future__ import annotations

import math

from opt_einsum import contract
from torch import Tensor

from multint.errors import OptionError
from multint.integrators.base import BiAffine
from multint.integrators.bilinear import LowerOrder, TensorProduct
from multint.integrators.checks import flag, positive
from multint.integrators.init import Projection, share
from multint.integrators.terms import Terms


class LowRank(BiAffine):
    """y = P((Qx) ⊙ (Rz)) + Uz + Vx + b: the tensor W[o,i,j] = Σ_r P[o,r] R[r,i] Q[r,j] has CP rank `rank`.

    With `z_term=False` this is the multiplicative RNN's map (Sutskever et al. 2011), with both terms off its factor
    alone. The latter with O = 1 and P = 1/√R is how a query x and a key z meet in scaled dot-product attention, and for
    one-hot entities x and z with Q = R, and a row of P for every relation, DistMult (Yang et al. 2015).

    Args:
        rank: number of factors R; None for ⌊O(X + Z) / (O + X + Z)⌋ and at least 1, by which P, Q and R together
            have at most O(X + Z) numbers, as U and V have.
        z_term, x_term: whether there is Uz, Vx.
        bias: what b starts at; None leaves it out.

    Raises: OptionError for a rank below 1.
    Source: Kim et al. 2017, low-rank bilinear pooling.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        rank: int | None = None,
        z_term: bool = True,
        x_term: bool = True,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        if rank is None:
            # Checkpoints rebuild a network from its settings, so another rule here could no longer load them.
            rank = max(1, out_features * (x_features + z_features) // (out_features + x_features + z_features))
        self.rank = positive(self, "rank", rank)
        variance = share(True, flag(self, "z_term", z_term), flag(self, "x_term", x_term))
        self.x_factor = Projection("x", x_features, rank)
        self.z_factor = Projection("z", z_features, rank)
        self.out_factor = Projection("", rank, out_features, variance)
        self.lower = LowerOrder(x_features, z_features, out_features, z_term, x_term, bias, variance)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.lower(self.out_factor(self.x_factor(x) * self.z_factor(z)), x, z)

    def terms(self) -> Terms:
        P, Q, R = self.out_factor.weight, self.x_factor.weight, self.z_factor.weight
        return self.lower.terms(contract("or,ri,rj->oij", P, R, Q))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class Tucker(BiAffine):
    """y = G ×₁ (Qx) ×₂ (Rz) + Uz + Vx + b: a full core G (O, Rz, Rx) between two projected streams.

    The tensor is W[o,i,j] = Σ_pq G[o,p,q] R[p,i] Q[q,j].

    Args:
        x_rank, z_rank: features of Qx and Rz; None for ⌊√(X + Z)⌋ and at most the stream's own, by which G has at
            most O(X + Z) numbers, as U and V have.
        z_term, x_term: whether there is Uz, Vx.
        bias: what b starts at; None leaves it out.

    Raises: OptionError for a rank below 1 or above the stream's features.
    Source: Tucker 1966; as a fusion of streams, Ben-younes et al. 2017 (MUTAN).
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        x_rank: int | None = None,
        z_rank: int | None = None,
        z_term: bool = True,
        x_term: bool = True,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        equal = math.isqrt(x_features + z_features)  # part of what a checkpoint means, as in LowRank
        x_rank = min(equal, x_features) if x_rank is None else positive(self, "x_rank", x_rank)
        z_rank = min(equal, z_features) if z_rank is None else positive(self, "z_rank", z_rank)
        for name, rank, features in (("x_rank", x_rank, x_features), ("z_rank", z_rank, z_features)):
            if rank > features:
                raise OptionError(f"Tucker: {name} is {rank}, expected at most the stream's {features} features")
        self.x_rank, self.z_rank = x_rank, z_rank
        variance = share(True, flag(self, "z_term", z_term), flag(self, "x_term", x_term))
        self.x_factor = Projection("x", x_features, x_rank)
        self.z_factor = Projection("z", z_features, z_rank)
        self.core = TensorProduct("", x_rank, z_rank, out_features, variance)
        self.lower = LowerOrder(x_features, z_features, out_features, z_term, x_term, bias, variance)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.lower(self.core(self.x_factor(x), self.z_factor(z)), x, z)

    def terms(self) -> Terms:
        G, Q, R = self.core.weight, self.x_factor.weight, self.z_factor.weight
        return self.lower.terms(contract("opq,pi,qj->oij", G, R, Q))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, x_rank={self.x_rank}, z_rank={self.z_rank}"
