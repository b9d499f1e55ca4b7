"""Normalisation of what an integrator's matrix products give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from multint.errors import OptionError
from multint.integrators.base import Integrator, build
from multint.integrators.bilinear import TensorProduct
from multint.integrators.checks import check_factory
from multint.integrators.hadamard import MultiplicativeIntegration


def layer_norm(features: int) -> nn.Module:
    """γ ⊙ (p − mean p) / std p: layer normalisation without a shift, since an integrator's own biases follow."""
    return nn.LayerNorm(features, bias=False)


class Normalised(Integrator):
    """An integrator in which every matrix product p is replaced by N(p), each by a norm N of its own.

    With `Additive`, y = N(Wx) + N(Uz) + b. Being no longer bi-affine, the result has no `terms()`. Every N(p) starts
    with unit variance, so y starts with the variance of all its terms together and not with 1.

    Args:
        integrator: factory `(X, Z, O) -> Integrator` of the map to normalise.
        norm: factory `(features) -> module` of N, (..., features) → (..., features), such as `torch.nn.RMSNorm`; or
            `RecurrentBatchNorm`, in a recurrent layer.

    Raises: OptionError where there is no product (in an `nn.Linear`), or one of a single feature, whose layer
    normalisation is 0.
    Source: Ba et al. 2016, where all gates of a stream share one normalisation.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
        norm: Callable[[int], nn.Module] = layer_norm,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        self.integrator = build(self, "integrator", integrator, x_features, z_features, out_features)
        products = [part for part in self.integrator.modules() if isinstance(part, nn.Linear | TensorProduct)]
        if not products:
            raise OptionError(f"Normalised: {type(self.integrator).__name__} has no product in an nn.Linear")
        for product in products:
            # A hook, not a wrapper around the product: weights keep the names by which they are found and stored.
            product.norm = normalisation(self, "norm", norm, product.out_features)
            product.register_forward_hook(_normalise)

    @classmethod
    def of(
        cls,
        integrator: Callable[..., Integrator],
        norm: Callable[[int], nn.Module] = layer_norm,
        **settings: Any,
    ) -> Callable[[int, int, int], Normalised]:
        """The factory `(X, Z, O) -> Normalised` of an integrator with these settings of its own."""
        return partial(cls, integrator=partial(integrator, **settings), norm=norm)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        y: Tensor = self.integrator(x, z)
        return y


def normalisation(owner: nn.Module, argument: str, factory: Callable[[int], nn.Module], features: int) -> nn.Module:
    """The norm that an argument of the owner, a factory, gives.

    Raises: OptionError for what is no factory, and where the norm would give nothing but 0.
    """
    check_factory(owner, argument, factory, "(features) -> module")
    norm = factory(features)
    if features == 1 and isinstance(norm, nn.LayerNorm):
        raise OptionError(
            f"{type(owner).__name__}: {argument} is the layer normalisation of one feature, which is always 0"
        )
    return norm


def _normalise(product: nn.Module, _: tuple[Tensor, ...], result: Tensor) -> Tensor:
    norm: Any = product.norm
    weight = next(norm.parameters(), result)  # in its dtype: under autocast the product's is a shorter one
    normed: Tensor = norm(result.to(weight.dtype))
    return normed.to(result.dtype)
