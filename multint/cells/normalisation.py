"""Layer normalisation of an integrator's projections."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from multint.errors import OptionError
from multint.integrators import Integrator
from multint.integrators.bilinear import TensorProduct


class Normalised(Integrator):
    """An integrator in which the result of every matrix product p is replaced by γ ⊙ (p − mean p) / std p.

    There is no shift: the integrator's own biases follow. With `Additive`, y = LN(Wx) + LN(Uz) + b. Being no longer
    bi-affine, the result has no `terms()`.

    Raises: OptionError where there is no product (in an `nn.Linear`), or one of a single feature, whose norm is 0.
    Source: Ba et al. 2016, where all gates of a stream share one normalisation.
    """

    def __init__(self, integrator: Integrator) -> None:
        super().__init__(integrator.x_features, integrator.z_features, integrator.out_features)
        self.integrator = integrator
        products = [module for module in integrator.modules() if isinstance(module, nn.Linear | TensorProduct)]
        widths = [product.out_features for product in products]
        if not widths or min(widths) == 1:
            what = "a product of width 1, which would become 0" if widths else "no product in an nn.Linear to normalise"
            raise OptionError(f"layer_norm: {type(integrator).__name__} has {what}")
        for product in products:
            # A hook, not a wrapper around the product: the weights keep the names that x_weights and z_weights give.
            product.norm = nn.LayerNorm(product.out_features, bias=False)
            product.register_forward_hook(_normalise)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        y: Tensor = self.integrator(x, z)
        return y


def built(
    factory: Callable[[int, int, int], Integrator],
    x_features: int,
    z_features: int,
    out_features: int,
    layer_norm: bool,
) -> Integrator:
    """The factory's integrator of these sizes, with its projections normalised if `layer_norm`.

    Raises: OptionError where the factory gives something else, or there is nothing to normalise.
    """
    integrator = factory(x_features, z_features, out_features)
    if not isinstance(integrator, Integrator):
        raise OptionError(f"integrator gives a {type(integrator).__name__}, expected a multint.Integrator")
    sizes = (integrator.x_features, integrator.z_features, integrator.out_features)
    if sizes != (x_features, z_features, out_features):
        raise OptionError(
            f"integrator gives a {type(integrator).__name__} of the sizes (X, Z, O) = {sizes}, expected "
            f"{(x_features, z_features, out_features)}"
        )
    return Normalised(integrator) if layer_norm else integrator


def _normalise(product: nn.Module, _: tuple[Tensor, ...], result: Tensor) -> Tensor:
    normed: Tensor = product.norm(result)  # type: ignore[operator]
    return normed.to(result.dtype)
