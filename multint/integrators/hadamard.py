"""Multiplicative integration by the elementwise product of the two projections, plain and general."""

from __future__ import annotations

import torch
from torch import Tensor

from multint.integrators.base import BiAffine
from multint.integrators.init import Projection, quadratic_root
from multint.integrators.terms import Terms, bias_term
from multint.integrators.vectors import add_bias, required, vector


class Hadamard(BiAffine):
    """y = (Wx + β1) ⊙ (Uz + β2) + b.

    Args:
        x_bias: what β1 starts at; None leaves it out.
        z_bias: what β2 starts at; None leaves it out. With both out this is eq. 2, otherwise eq. 3.
        bias: what b starts at; None leaves it out.

    Source: Wu et al. 2016, eqs. 2 and 3. β1 multiplies Uz, and β2 multiplies Wx.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        x_bias: float | None = None,
        z_bias: float | None = None,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        self.x_bias = vector(self, "x_bias", x_bias, out_features)
        self.z_bias = vector(self, "z_bias", z_bias, out_features)
        self.bias = vector(self, "bias", bias, out_features)
        # The product of the sums has the variance v² + (β1² + β2²)·v when each projection has v.
        variance = quadratic_root(1.0, (x_bias or 0.0) ** 2 + (z_bias or 0.0) ** 2)
        self.x_projection = Projection("x", x_features, out_features, variance)
        self.z_projection = Projection("z", z_features, out_features, variance)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        wx = add_bias(self.x_projection(x), self.x_bias)
        uz = add_bias(self.z_projection(z), self.z_bias)
        return add_bias(wx * uz, self.bias)

    def terms(self) -> Terms:
        U, V = self.z_projection.weight, self.x_projection.weight
        x_bias, z_bias = bias_term(self.x_bias, V), bias_term(self.z_bias, U)
        return Terms(
            W=torch.einsum("oi,oj->oij", U, V),
            U=x_bias[:, None] * U,
            V=z_bias[:, None] * V,
            b=bias_term(self.bias, U) + x_bias * z_bias,
        )


class MultiplicativeIntegration(BiAffine):
    """y = α ⊙ Wx ⊙ Uz + β1 ⊙ Uz + β2 ⊙ Wx + b.

    α = 0, β1 = β2 = 1 is the additive block; α = 1 is eq. 3. The papers' settings differ by task: text8 MI-RNN
    (2, .5, .5, 0), text8 MI-LSTM (1, .5, .5, 0), Hutter, skip-thought and reader (1, 1, 1, 0). With W = U = I it is
    the form in which a ladder network's combinator joins each unit with its copy (Rasmus et al. 2015).

    Args:
        alpha, beta1, beta2, bias: what the learnt vectors (O,) α, β1, β2 and b start at.

    Source: Wu et al. 2016, eq. 4.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        alpha: float = 1.0,
        beta1: float = 1.0,
        beta2: float = 1.0,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        self.alpha = required(self, "alpha", alpha, out_features)
        self.beta1 = required(self, "beta1", beta1, out_features)
        self.beta2 = required(self, "beta2", beta2, out_features)
        self.bias = vector(self, "bias", bias, out_features)
        variance = quadratic_root(alpha**2, beta1**2 + beta2**2)
        self.x_projection = Projection("x", x_features, out_features, variance)
        self.z_projection = Projection("z", z_features, out_features, variance)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        wx, uz = self.x_projection(x), self.z_projection(z)
        # Under autocast the float32 vectors must not promote what the products computed. What depends on x alone is
        # kept apart, so that in a scan only one multiply-add per step remains between the product and the gates.
        alpha, beta1, beta2 = self.alpha.to(wx.dtype), self.beta1.to(wx.dtype), self.beta2.to(wx.dtype)
        of_x = beta2 * wx if self.bias is None else torch.addcmul(self.bias.to(wx.dtype), beta2, wx)
        return torch.addcmul(of_x, torch.addcmul(beta1, alpha, wx), uz)

    def terms(self) -> Terms:
        U, V = self.z_projection.weight, self.x_projection.weight
        return Terms(
            W=torch.einsum("o,oi,oj->oij", self.alpha, U, V),
            U=self.beta1[:, None] * U,
            V=self.beta2[:, None] * V,
            b=bias_term(self.bias, U),
        )
