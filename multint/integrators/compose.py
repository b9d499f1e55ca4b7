"""Compositions that no operator writes: the streams changed over, and a published pair of maps."""

from __future__ import annotations

from torch import Tensor

from multint.integrators.additive import Additive
from multint.integrators.base import BiAffine, Integrator, Through, check_parts, parts_weights, terms_of
from multint.integrators.hadamard import Hadamard
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
