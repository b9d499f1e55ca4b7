"""The additive block, written as two products or as one: what multiplicative integration is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from multint.integrators.base import BiAffine
from multint.integrators.init import Projection, fill, share
from multint.integrators.terms import Terms, bias_term
from multint.integrators.vectors import vector


class Additive(BiAffine):
    """y = Wx + Uz + b.

    Equals `nn.Linear(X + Z, O)` on [x; z] with the weight [W U].

    Args:
        bias: what b starts at; None leaves it out.

    Source: Wu et al. 2016, eq. 1.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        self.x_projection = Projection("x", x_features, out_features, variance=0.5)
        self.z_projection = Projection("z", z_features, out_features, variance=0.5)
        self.bias = vector(self, "bias", bias, out_features)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.x_projection(x) + self.z_projection.plus(z, self.bias)

    def terms(self) -> Terms:
        U, V = self.z_projection.weight, self.x_projection.weight
        return Terms(U.new_zeros(self.out_features, self.z_features, self.x_features), U, V, bias_term(self.bias, U))


class Concat(BiAffine):
    """y = A[x; z] + b: the same map as `Additive`, with one weight and one product over both streams.

    Args:
        bias: what b starts at; None leaves it out.

    Source: Jayakumar et al. 2020, the standard practice.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        self.projection = Projection("xz", x_features + z_features, out_features)
        # As in Additive, the two streams have an equal share of the output's variance, whatever their sizes.
        x_part, z_part = self.projection.weight.split([x_features, z_features], dim=1)
        fill(x_part, share(True, True) / x_features)
        fill(z_part, share(True, True) / z_features)
        self.bias = vector(self, "bias", bias, out_features)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        if x.shape[:-1] != z.shape[:-1]:
            leading = torch.broadcast_shapes(x.shape[:-1], z.shape[:-1])
            x, z = x.expand(*leading, -1), z.expand(*leading, -1)
        return self.projection.plus(torch.cat([x, z], dim=-1), self.bias)

    def terms(self) -> Terms:
        V, U = self.projection.weight.split([self.x_features, self.z_features], dim=1)
        return Terms(U.new_zeros(self.out_features, self.z_features, self.x_features), U, V, bias_term(self.bias, U))
