"""Layer normalisation of an integrator's projections."""

from __future__ import annotations

from torch import Tensor, nn

from multint.integrators import Integrator
from multint.integrators.bilinear import TensorProduct


class Normalised(Integrator):
    """An integrator in which the result of every matrix product p is replaced by γ ⊙ (p − mean p) / std p.

    There is no shift: the integrator's own biases follow. With `Additive`, y = LN(Wx) + LN(Uz) + b. Being no longer
    bi-affine, the result has no `terms()`.

    Source: Ba et al. 2016, eq. 20, where all gates of a stream share one normalisation.
    """

    def __init__(self, integrator: Integrator) -> None:
        super().__init__(integrator.x_features, integrator.z_features, integrator.out_features)
        self.integrator = integrator
        self.x_weights = tuple(f"integrator.{name}" for name in integrator.x_weights)
        self.z_weights = tuple(f"integrator.{name}" for name in integrator.z_weights)
        products = [module for module in integrator.modules() if isinstance(module, nn.Linear | TensorProduct)]
        for product in products:
            # A hook, not a wrapper around the product: the weights keep the names that x_weights and z_weights give.
            product.norm = nn.LayerNorm(product.out_features, bias=False)
            product.register_forward_hook(_normalise)

    def forward(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        y: Tensor = self.integrator(x, z)
        return y


def normalised(integrator: Integrator, layer_norm: bool) -> Integrator:
    """The integrator, with its projections normalised if `layer_norm`."""
    return Normalised(integrator) if layer_norm else integrator


def _normalise(product: nn.Module, _: tuple[Tensor, ...], result: Tensor) -> Tensor:
    normed: Tensor = product.norm(result)  # type: ignore[operator]
    return normed.to(result.dtype)
