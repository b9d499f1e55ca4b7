"""Compositions that no operator writes: the streams changed over, x projected first, and a published pair of maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from multint.integrators.additive import Additive
from multint.integrators.base import BiAffine, Integrator, Through, build, check_parts, parts_weights, terms_of
from multint.integrators.diagonal import Diagonal
from multint.integrators.hadamard import Hadamard
from multint.integrators.init import Projection
from multint.integrators.terms import Terms


class Swapped(BiAffine):
    """y = f(z, x): the streams change places, so f's x_features are z's.

    Raises: FormError by `terms()` where f has none.
    """

    def __init__(self, integrator: Integrator) -> None:
        check_parts(self, integrator)
        super().__init__(integrator.z_features, integrator.x_features, integrator.out_features)
        self.integrator = integrator

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.integrator(z, x)

    @property
    def x_weights(self) -> tuple[str, ...]:
        return tuple(parts_weights(self, "z_weights"))

    @property
    def z_weights(self) -> tuple[str, ...]:
        return tuple(parts_weights(self, "x_weights"))

    def terms(self) -> Terms:
        W, U, V, b = terms_of(self.integrator)
        return Terms(W.transpose(1, 2), V, U, b)


class Projected(BiAffine):
    """y = f(Vx, z): a linear map V of x, and then an f with as many inputs as outputs.

    By default y = a(z) ⊙ Vx + b(z), FiLM after a linear layer, which `Diagonal` cannot be by itself at O ≠ X.

    Args:
        integrator: factory `(O, Z, O) -> Integrator` of f.

    Raises: OptionError where the factory gives no integrator; ShapeError where it gives other sizes; FormError by
    `terms()` where f has none.
    Source: Perez et al. 2018, whose FiLM follows a layer's matrix.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        integrator: Callable[[int, int, int], Integrator] = Diagonal,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        self.projection = Projection("x", x_features, out_features)
        self.integrator = build(self, "integrator", integrator, out_features, z_features, out_features)

    @classmethod
    def of(cls, integrator: Callable[[int, int, int], Integrator]) -> Callable[[int, int, int], Projected]:
        """The factory `(X, Z, O) -> Projected` of an integrator."""
        return partial(cls, integrator=integrator)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.integrator(self.projection(x), z)

    @property
    def x_weights(self) -> tuple[str, ...]:
        """The projection alone: x reaches f through nothing else."""
        return ("projection.weight",)

    def terms(self) -> Terms:
        W, U, V, b = terms_of(self.integrator)
        P = self.projection.weight
        return Terms(torch.einsum("ozm,mx->ozx", W, P), U, V @ P, b)


class Krause(Through):
    """y = A((W_m x) ⊙ (U_m z)) + Vx + b: `Additive @ Hadamard`, the multiplicative LSTM's map, built as a class.

    The intermediate m has as many features as z, whose place it takes in all gates.

    Source: Krause et al. 2016, in the variant with the LSTM's usual tanh candidate.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__(
            Additive(x_features, z_features, out_features, bias),
            Hadamard(x_features, z_features, z_features, bias=None),
        )
