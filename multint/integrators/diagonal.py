"""One stream scales the other, feature by feature: FiLM, the gated linear unit, and the Mogrifier's gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multint.errors import SquareError
from multint.integrators.base import BiAffine, Integrator
from multint.integrators.checks import positive
from multint.integrators.init import Projection
from multint.integrators.terms import Terms
from multint.integrators.vectors import vector


class Diagonal(BiAffine):
    """y = a(z) ⊙ x + b(z), with a(z) = Az + a and b(z) = Bz + b: FiLM, a hypernetwork of diagonal W'(z), so O = X.

    It starts at the identity, y = x: A, B and b start at 0 and a at 1. At other sizes it scales another map g:
    `Projected(X, Z, O)` is y = a(z) ⊙ Vx + b(z), and `Swapped(Diagonal(O, X, O)) @ g` is y = a(x) ⊙ g(x, z) + b(x),
    which starts as g.

    Raises: SquareError where out_features differs from x_features.
    Source: Perez et al. 2018 (FiLM); Jayakumar et al. 2020, the diagonal form.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        _check_square(self)
        self.scale_projection = Projection("z", z_features, out_features, variance=0.0)
        self.shift_projection = Projection("z", z_features, out_features, variance=0.0)
        self.scale_bias = nn.Parameter(torch.ones(out_features))
        self.shift_bias = nn.Parameter(torch.zeros(out_features))

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        scale = self.scale_projection.plus(z, self.scale_bias)
        return torch.addcmul(self.shift_projection.plus(z, self.shift_bias), scale, x.to(scale.dtype))

    def terms(self) -> Terms:
        A, B = self.scale_projection.weight, self.shift_projection.weight
        return Terms(
            W=torch.diag_embed(A.T).permute(1, 0, 2),  # W[o,i,j] = A[o,i] where j = o
            U=B,
            V=torch.diag(self.scale_bias),
            b=self.shift_bias,
        )


class Gated(Integrator):
    """y = (Vx + c) ⊙ σ(Uz + d): the gated linear unit over two streams. Not bi-affine, so it has no `terms()`.

    With z = x it is `torch.nn.functional.glu` of one linear layer with 2·O outputs.

    Args:
        bias: what c and d start at; None leaves both out.

    Source: Dauphin et al. 2017.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        self.x_bias = vector(self, "bias", bias, out_features)
        self.z_bias = vector(self, "bias", bias, out_features)
        # Var y = (v + c²)·E[σ²] − c²·E[σ]², where v is the variance of Vx.
        c, (mean, second) = bias or 0.0, _sigmoid_moments(bias or 0.0)
        variance = max(1.0 - c**2 * (second - mean**2), 0.0) / second
        self.x_projection = Projection("x", x_features, out_features, variance)
        self.z_projection = Projection("z", z_features, out_features)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.x_projection.plus(x, self.x_bias) * self.z_projection.plus(z, self.z_bias).sigmoid()


class SigmoidScale(Integrator):
    """y = 2σ(Qz) ⊙ x, so O = X: each feature of x is scaled by a number between 0 and 2. Not bi-affine: no `terms()`.

    Qz starts with the variance ¼, near the identity: y has the variance 1.06.

    Args:
        rank: that of Q, as a product of two matrices; None for a full one.

    Raises: SquareError where out_features differs from x_features; OptionError for a rank below 1.
    Source: Melis et al. 2020, a round of the Mogrifier.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        rank: int | None = None,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        _check_square(self)
        self.rank = None if rank is None else positive(self, "rank", rank)
        self.z_factor = None if rank is None else Projection("z", z_features, rank)
        self.z_projection = Projection("z" if rank is None else "", rank or z_features, out_features, variance=0.25)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        gate = self.z_projection(z if self.z_factor is None else self.z_factor(z)).sigmoid()
        return 2 * gate * x.to(gate.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.rank is None else f", rank={self.rank}")


def _check_square(f: Integrator) -> None:
    """Raise a SquareError unless O = X."""
    if f.out_features != f.x_features:
        raise SquareError(
            f"{type(f).__name__}: out_features is {f.out_features}, expected x_features ({f.x_features}), since it "
            "scales x; for other sizes, Projected lets it scale a linear map, ThroughOf and SwappedOf any other map"
        )


def _sigmoid_moments(shift: float) -> tuple[float, float]:
    """E[σ(u + d)] and E[σ(u + d)²] for u ~ N(0, 1), by quadrature."""
    u = torch.linspace(-8.0, 8.0, 1001, dtype=torch.float64, device="cpu")
    weight = torch.exp(-(u**2) / 2)
    sigmoid = torch.sigmoid(u + shift)
    mean, second = ((weight * sigmoid**power).sum() / weight.sum() for power in (1, 2))
    return mean.item(), second.item()
