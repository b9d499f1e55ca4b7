"""A network over one stream that writes the weights applied to the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from multint.errors import ShapeError
from multint.integrators.base import Integrator, build
from multint.integrators.bilinear import Bilinear
from multint.integrators.checks import check_factory, positive


def tanh_layer(in_features: int, out_features: int) -> nn.Module:
    """tanh(Az + a): the default network of a `Hypernetwork`."""
    return nn.Sequential(nn.Linear(in_features, out_features), nn.Tanh())


class Hypernetwork(Integrator):
    """y = W'(g(z))x + b'(g(z)), where a network g reads z, and W' and b' are affine in what it gives.

    Such a map is `head(x, g(z))` for a bi-affine head: `Bilinear` writes all of W', `LowRank` a W' of low rank,
    P diag(·) Q, and `Diagonal` the diagonal alone. With `network=nn.Linear` the whole is bilinear in x and z.

    On average over draws of its weights it starts with unit-variance y on unit-variance streams, for any network g and
    any head: what g gives is measured when the module is built, and brought to the scale that the head is initialised
    for. One draw of a layer of 16 features may be off by 30 % where g's values have a mean far from 0, as a sigmoid's.

    Args:
        features: number of features G that g gives; None for 1 + ⌊Z/X⌋ and at least 4. By the first the default
            head's tensor has at most as many numbers, O(X + Z), as an `Additive` of the sizes; below the second g(z)
            tells too little. Another head is cheaper, and can be given more.
        head: factory `(X, G, O) -> Integrator` of the map applied to x.
        network: factory `(Z, G) -> module` of g, (..., Z) → (..., G).

    Raises: OptionError for features below 1, or no factory; ShapeError where the network does not give G features, or
    the head is of other sizes.
    Source: Ha et al. 2017; Jayakumar et al. 2020.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        features: int | None = None,
        head: Callable[[int, int, int], Integrator] = Bilinear,
        network: Callable[[int, int], nn.Module] = tanh_layer,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        if features is None:
            # Checkpoints rebuild a network from its settings, so another rule here could no longer load them.
            features = max(4, 1 + z_features // x_features)
        self.features = positive(self, "features", features)
        check_factory(self, "network", network, "(Z, G) -> module")
        self.network = network(z_features, features)
        self.head = build(self, "head", head, x_features, features, out_features)
        self.scale: Tensor
        self.register_buffer("scale", self._unit_variance_scale())

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        context = self.network(z)
        return self.head(x, context * self.scale.to(context.dtype))

    def _unit_variance_scale(self) -> Tensor:
        """1/√E[g(z)²] over normal z, since the head is initialised for unit-variance streams and g is any network.

        The draws come from a generator of their own, so that building a module takes none from the global one.
        """
        weight = next(self.network.parameters(), torch.empty(0))
        z = torch.randn(1024, self.z_features, generator=torch.Generator().manual_seed(0)).to(weight)
        was_training = self.network.training
        with torch.no_grad():
            context = self.network.eval()(z)  # without dropout, and without a trace in running statistics
        self.network.train(was_training)
        if context.shape != (1024, self.features):
            raise ShapeError(
                f"Hypernetwork: network gives the shape {tuple(context.shape)} for z (1024, {self.z_features}), "
                f"expected (1024, {self.features})"
            )
        moment = context.square().mean()
        return torch.where(moment > 0, moment.rsqrt(), 1.0)  # a network that starts at 0 has no scale to correct
