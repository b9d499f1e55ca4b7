"""A stack of integrators on one context."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from multint.errors import OptionError, SquareError
from multint.integrators import Bilinear, Concat, Integrator, Projected
from multint.integrators.base import build
from multint.integrators.checks import check_callable, flag, number, positive
from multint.integrators.init import fill
from multint.integrators.normalised import normalisation


class Conditional(Integrator):
    """A network from x to y whose every layer reads one context c, `f(x, c) -> y`: an integrator made of L others,

    y_k = g·φ(f_k(y_{k−1}, c)) for k = 1 … L−1 with y_0 = x, and y = f_L(y_{L−1}, c).

    The constant g = 1/√E[φ(u)²] for normal u, √2 for a ReLU, brings y_k back to a unit second moment, which the
    integrators are initialised for: unit-variance streams start with outputs of about unit variance at any depth.
    (Products are skewed, and a ReLU lets more of them through: with MI the variance grows by some 10 % a layer.)

    One word chooses how the context enters: `None` is a plain MLP on [x; c], in which f_1 is `Concat` and the others
    linear; `Concat` and `Additive` give the context again to every layer (Skip-MLP); `Diagonal` is FiLM, and
    `MultiplicativeIntegration`, `LowRank`, `Bilinear` and `Hypernetwork` are what they are. An integrator that needs
    O = X, as `Diagonal` does, comes after a linear map: f_k(y, c) = Diagonal(V_k y, c), see `Projected`.

    Shapes: x (..., X), c (..., C), y (..., O). The leading shapes broadcast from the right, as everywhere in PyTorch:
    c (B, C) is one context for each sequence of x (T, B, X), and c (C,) one for all. For a context for each set of
    x (B, N, X) give c as (B, 1, C), `c.unsqueeze(1)`. As (B, C) it is an error for nearly all N, but for N = B row n of
    every set would get context n, and for N = 1 every row every context. A context that rows share is projected, or
    turned into weights, once.

    Args:
        hidden: features of y_1 … y_{L−1}.
        layers: L, the last one included.
        integrator: factory `(X, C, O) -> Integrator` of the f_k, or None.
        activation: φ, elementwise.
        residual: whether y_{k−1} is added to y_k, for k = 2 … L−1. The variance then grows with k.
        norm: factory `(features) -> module` of a normalisation N, such as `torch.nn.LayerNorm`: the layers k = 2 … L
            read N_k(y_{k−1}), so that what the context does to a layer's result is left alone.
        gain: g; None for the one above, and 1 for an unscaled φ.

    Raises: OptionError for sizes below 1, an activation that is no elementwise function, or no integrator; ShapeError
    for streams that do not fit. Warns where `residual` has no effect, as there are too few layers.
    Source: Jayakumar et al. 2020; Perez et al. 2018 for FiLM between layers.
    """

    z_name = "context"

    def __init__(
        self,
        x_features: int,
        context_features: int,
        out_features: int,
        hidden: int = 128,
        layers: int = 3,
        integrator: Callable[[int, int, int], Integrator] | None = Bilinear,
        activation: Callable[[Tensor], Any] = torch.relu,  # -> Any: jsonargparse takes -> Tensor for a class to build
        residual: bool = False,
        norm: Callable[[int], nn.Module] | None = None,
        gain: float | None = None,
    ) -> None:
        super().__init__(x_features, context_features, out_features)
        positive(self, "hidden", hidden)
        inputs = [x_features] + [hidden] * (positive(self, "layers", layers) - 1)
        if flag(self, "residual", residual) and layers < 3:
            warnings.warn(f"Conditional: residual has no effect with layers={layers}", stacklevel=2)
        self.activation, self.residual = activation, residual
        check_callable(self, "activation", activation, "an elementwise function, such as torch.relu")
        u, phi = _elementwise(activation)
        self.gain = _gain(u, phi) if gain is None else number(self, "gain", gain)
        if integrator is not None and _needs_equal_features(integrator, x_features, context_features):
            # Told by the factory and not by the sizes: hidden layers have O = X, and need their matrices all the same.
            integrator = Projected.of(integrator)
        self.layers = nn.ModuleList(
            _layer(self, integrator, k, size, context_features, out)
            for k, (size, out) in enumerate(zip(inputs, [*inputs[1:], out_features], strict=True))
        )
        self.norms = nn.ModuleList(
            nn.Identity() if norm is None else normalisation(self, "norm", norm, size) for size in inputs[1:]
        )

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., C)
    ) -> Tensor:  # (..., O)
        y: Tensor = self.layers[0](x, z)
        stream = None  # y_k of the equation; y is f_k's result
        for layer, norm in zip(list(self.layers)[1:], self.norms, strict=True):
            phi = self.activation(y) if self.gain == 1 else self.gain * self.activation(y)
            stream = phi if stream is None or not self.residual else stream + phi
            y = layer(norm(stream), z) if isinstance(layer, Integrator) else layer(norm(stream))
        return y

    @property
    def x_weights(self) -> tuple[str, ...]:
        """Those of the first layer: x goes through no other."""
        first: Any = self.layers[0]
        return tuple(f"layers.0.{name}" for name in first.x_weights)


def _layer(
    owner: nn.Module,
    integrator: Callable[[int, int, int], Integrator] | None,
    k: int,
    in_features: int,
    context_features: int,
    out_features: int,
) -> nn.Module:
    """The stack's layer of that index: an integrator, or the linear map of a plain MLP."""
    if integrator is not None:
        return build(owner, "integrator", integrator, in_features, context_features, out_features)
    if k == 0:
        return Concat(in_features, context_features, out_features)
    linear = nn.Linear(in_features, out_features)
    fill(linear.weight, 1 / in_features)
    nn.init.zeros_(linear.bias)
    return linear


def _needs_equal_features(integrator: Callable[[int, int, int], Integrator], x_features: int, z_features: int) -> bool:
    """Whether the factory makes nothing but integrators with O = X. It is asked for another, without memory."""
    try:
        with torch.device("meta"):
            integrator(x_features, z_features, x_features + 1)
    except SquareError:
        return True
    except Exception:  # the real sizes' business: they are built next, and what is wrong with them is said there
        return False
    return False


def _elementwise(activation: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
    """Numbers u all over a normal's range, and φ(u). Raises an OptionError unless φ is an elementwise function."""
    expected = "expected an elementwise function, such as torch.relu or torch.nn.GELU()"
    parameter = next(activation.parameters(), None) if isinstance(activation, nn.Module) else None
    like = torch.empty(0, device="cpu") if parameter is None else parameter.detach()
    u = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64, device="cpu")
    state = torch.get_rng_state()
    with torch.no_grad():
        phi = activation(u.to(like, copy=True))  # which may work in place
    if not isinstance(phi, Tensor) or phi.shape != u.shape:
        got = f"the shape {tuple(phi.shape)}" if isinstance(phi, Tensor) else f"a {type(phi).__name__}"
        raise OptionError(f"Conditional: activation gives {got} for a tensor {tuple(u.shape)}, {expected}")
    if phi.is_meta:
        return u, phi
    kept = torch.arange(len(u), device="cpu") % 3 == 0
    torch.set_rng_state(state)  # a φ that draws, draws the same
    with torch.no_grad():
        again = activation(torch.where(kept, u, 0).to(like))
    if not torch.allclose(phi[kept.to(phi.device)], again[kept.to(phi.device)], rtol=1e-5, atol=0, equal_nan=True):
        raise OptionError(f"Conditional: activation makes a number's result depend on the others, {expected}")
    return u, phi


def _gain(u: Tensor, phi: Tensor) -> float:
    """1/√E[φ(u)²] for u ~ N(0, 1), by quadrature; 1 for a φ that is 0."""
    if phi.is_meta:
        raise OptionError("Conditional: the activation's parameters are on the meta device; give its gain, such as 1")
    weight = torch.exp(-(u**2) / 2)
    moment = float((weight * phi.cpu().double() ** 2).sum() / weight.sum())
    return 1 / math.sqrt(moment) if moment > 0 else 1.0
