"""The algebra: sums, scalings and compositions of integrators, which are integrators again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multint.errors import FormError, OptionError, ShapeError
from multint.integrators.additive import Additive
from multint.integrators.base import BiAffine, Integrator, Terms
from multint.integrators.hadamard import Hadamard


class Sum(BiAffine):
    """y = f(x, z) + g(x, z), written `f + g`.

    Raises: ShapeError unless f and g agree in every number of features; FormError by `terms()` where a part has none.
    """

    def __init__(self, first: Integrator, second: Integrator) -> None:
        _check_parts(self, first, second)
        super().__init__(first.x_features, first.z_features, first.out_features)
        sizes = [(f.x_features, f.z_features, f.out_features) for f in (first, second)]
        if sizes[0] != sizes[1]:
            raise ShapeError(f"Sum: the features (X, Z, O) are {sizes[0]} and {sizes[1]}, expected equal ones")
        self.first, self.second = first, second
        self.x_weights = _prefixed("first", first.x_weights) + _prefixed("second", second.x_weights)
        self.z_weights = _prefixed("first", first.z_weights) + _prefixed("second", second.z_weights)

    def forward(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        self.check(x, z)
        return self.first(x, z) + self.second(x, z)

    def terms(self) -> Terms:
        return _terms(self.first) + _terms(self.second)


class Scaled(BiAffine):
    """y = a·f(x, z) for a fixed number a, written `a * f`.

    Raises: FormError by `terms()` where f has none.
    """

    def __init__(self, scale: float, integrator: Integrator) -> None:
        _check_parts(self, integrator)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise OptionError(f"Scaled: scale is {scale!r}, expected a number")
        super().__init__(integrator.x_features, integrator.z_features, integrator.out_features)
        self.scale = scale
        self.integrator = integrator
        self.x_weights = _prefixed("integrator", integrator.x_weights)
        self.z_weights = _prefixed("integrator", integrator.z_weights)

    def forward(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        self.check(x, z)
        return self.scale * self.integrator(x, z)

    def terms(self) -> Terms:
        return _terms(self.integrator).scaled(self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class Through(BiAffine):
    """y = f(x, g(x, z)), written `f @ g`: the inner map's result takes z's place in the outer one.

    `Additive @ Hadamard` is the multiplicative LSTM's map (Krause et al. 2016: m = (W_mx x) ⊙ (W_mh h) in h's place in
    all gates) and, as the only map of an RNN, the multiplicative RNN's (Sutskever et al. 2011).

    Raises: ShapeError unless g's outputs are f's z_features and both take the same x; FormError by `terms()` where the
    whole is not bi-affine, that is where f multiplies x with a g that depends on x too.
    """

    def __init__(self, outer: Integrator, inner: Integrator) -> None:
        _check_parts(self, outer, inner)
        super().__init__(outer.x_features, inner.z_features, outer.out_features)
        if inner.x_features != outer.x_features:
            raise ShapeError(
                f"Through: inner's x_features is {inner.x_features}, expected outer's x_features, {outer.x_features}"
            )
        if inner.out_features != outer.z_features:
            raise ShapeError(
                f"Through: inner's out_features is {inner.out_features}, expected outer's z_features, "
                f"{outer.z_features}"
            )
        self.outer, self.inner = outer, inner
        self.x_weights = _prefixed("outer", outer.x_weights) + _prefixed("inner", inner.x_weights)
        self.z_weights = _prefixed("outer", outer.z_weights) + _prefixed("inner", inner.z_weights)

    def forward(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        self.check(x, z)
        return self.outer(x, self.inner(x, z))

    def terms(self) -> Terms:
        W, U, V, b = _terms(self.outer)
        inner = _terms(self.inner)
        if _present(W) and (_present(inner.W) or _present(inner.V)):
            raise FormError(
                f"Through: {type(self.outer).__name__} multiplies x with {type(self.inner).__name__}(x, z), which "
                "depends on x, so the whole is quadratic in x and has no terms()"
            )
        return Terms(
            W=torch.einsum("om,mij->oij", U, inner.W) + torch.einsum("omj,mi->oij", W, inner.U),
            U=U @ inner.U,
            V=V + U @ inner.V + torch.einsum("omj,m->oj", W, inner.b),
            b=b + U @ inner.b,
        )


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


class Swapped(BiAffine):
    """y = f(z, x): the streams change places, so f's x_features are z's.

    Raises: FormError by `terms()` where f has none.
    """

    def __init__(self, integrator: Integrator) -> None:
        _check_parts(self, integrator)
        super().__init__(integrator.z_features, integrator.x_features, integrator.out_features)
        self.integrator = integrator
        self.x_weights = _prefixed("integrator", integrator.z_weights)
        self.z_weights = _prefixed("integrator", integrator.x_weights)

    def forward(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        self.check(x, z)
        return self.integrator(z, x)

    def terms(self) -> Terms:
        W, U, V, b = _terms(self.integrator)
        return Terms(W.transpose(1, 2), V, U, b)


def _check_parts(whole: Integrator, *parts: Integrator) -> None:
    for part in parts:
        if not isinstance(part, Integrator):
            raise OptionError(f"{type(whole).__name__}: got a {type(part).__name__}, expected an Integrator")


def _terms(integrator: Integrator) -> Terms:
    if not isinstance(integrator, BiAffine):
        raise FormError(f"{type(integrator).__name__} is not bi-affine: it has no terms()")
    return integrator.terms()


def _present(term: Tensor) -> bool:
    """Whether a term is there: not zero, or able to become so by training."""
    return term.requires_grad or bool(term.any())


def _prefixed(part: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for name in names)
