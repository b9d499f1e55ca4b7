"""What an integrator is, what a bi-affine one is, and the algebra of both.

The compositions stand beside the base class because its operators build them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from multint.errors import FormError, OptionError, ShapeError
from multint.integrators.checks import check_factory, check_features, check_leading, number, positive
from multint.integrators.terms import Terms


class Integrator(nn.Module, ABC):
    """A map of two streams, `f(x, z) -> y`. A subclass gives `integrate(x, z)`; calling f checks the streams first.

    Shapes: x (..., X), z (..., Z), y (..., O); the leading shapes broadcast against each other.

    `x_weights` and `z_weights` name the parameters through which a stream enters: with those at zero, `f` does not
    depend on that stream. Weight-drop and initialisers find the recurrent and the input matrices by them. They are
    those of f's parts, so only a class with other matrices, such as those of an `nn.Linear`, states them, as
    `x_weights = ("inner.weight",)`.

    Integrators form an algebra: `f + g`, `f - g`, `-f`, `a * f` and `f / a` with a number a, and `f @ g`, which is
    `f(x, g(x, z))`.

    Raises: OptionError for a number of features below 1; ShapeError for streams that do not fit.
    """

    z_name: ClassVar[str] = "z"  # what errors call the stream z

    def __init__(self, x_features: int, z_features: int, out_features: int) -> None:
        super().__init__()
        self.x_features = positive(self, "x_features", x_features)
        self.z_features = positive(self, f"{self.z_name}_features", z_features)
        self.out_features = positive(self, "out_features", out_features)

    @abstractmethod
    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        """The two streams' meeting. The features are as declared, and the leading shapes broadcast."""

    def forward(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        """`integrate(x, z)` for streams that fit; a ShapeError for others."""
        check_features(self, "x", x, self.x_features, "x_features")
        check_features(self, self.z_name, z, self.z_features, f"{self.z_name}_features")
        if x.shape[:-1] != z.shape[:-1]:
            check_leading(self, x, z)
        return self.integrate(x, z)

    @property
    def x_weights(self) -> tuple[str, ...]:
        """The names of the parameters through which x enters."""
        return tuple(parts_weights(self, "x_weights"))

    @property
    def z_weights(self) -> tuple[str, ...]:
        """The names of the parameters through which z enters."""
        return tuple(parts_weights(self, "z_weights"))

    def extra_repr(self) -> str:
        return f"{self.x_features}, {self.z_features}, {self.out_features}"

    def __add__(self, other: Integrator) -> Sum:
        return Sum(self, other) if isinstance(other, Integrator) else NotImplemented

    def __sub__(self, other: Integrator) -> Sum:
        return Sum(self, -other) if isinstance(other, Integrator) else NotImplemented

    def __neg__(self) -> Scaled:
        return Scaled(-1.0, self)

    def __mul__(self, scale: float) -> Scaled:
        return Scaled(scale, self) if isinstance(scale, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Scaled:
        return Scaled(1 / divisor, self) if isinstance(divisor, int | float) else NotImplemented

    def __matmul__(self, inner: Integrator) -> Through:
        return Through(self, inner) if isinstance(inner, Integrator) else NotImplemented


class BiAffine(Integrator):
    """An integrator that is affine in x for fixed z and affine in z for fixed x, and so has a dense form."""

    @abstractmethod
    def terms(self) -> Terms:
        """The dense form, differentiable with respect to the parameters. O·Z·X numbers: for study, not for speed."""


class Sum(BiAffine):
    """y = f(x, z) + g(x, z), written `f + g`; `f - g` is the sum of f and `-g`.

    Raises: ShapeError unless f and g agree in every number of features; FormError by `terms()` where a part has none.
    """

    def __init__(self, first: Integrator, second: Integrator) -> None:
        check_parts(self, first, second)
        super().__init__(first.x_features, first.z_features, first.out_features)
        sizes = [(f.x_features, f.z_features, f.out_features) for f in (first, second)]
        if sizes[0] != sizes[1]:
            raise ShapeError(f"Sum: the features (X, Z, O) are {sizes[0]} and {sizes[1]}, expected equal ones")
        self.first, self.second = first, second

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.first(x, z) + self.second(x, z)

    def terms(self) -> Terms:
        return terms_of(self.first) + terms_of(self.second)


class Scaled(BiAffine):
    """y = a·f(x, z) for a fixed number a, written `a * f`; `-f` has a = −1, and `f / a` the inverse of a.

    Raises: OptionError where a is no finite number; FormError by `terms()` where f has none.
    """

    def __init__(self, scale: float, integrator: Integrator) -> None:
        check_parts(self, integrator)
        super().__init__(integrator.x_features, integrator.z_features, integrator.out_features)
        self.scale = number(self, "scale", scale)
        self.integrator = integrator

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.scale * self.integrator(x, z)

    def terms(self) -> Terms:
        return terms_of(self.integrator).scaled(self.scale)

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
        check_parts(self, outer, inner)
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

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.outer(x, self.inner(x, z))

    def terms(self) -> Terms:
        W, U, V, b = terms_of(self.outer)
        inner = terms_of(self.inner)
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


def outermost_integrators(module: nn.Module) -> dict[str, Integrator]:
    """The module's integrators by name, without those inside another one, which alone knows their streams."""
    found: dict[str, Integrator] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        if isinstance(part, Integrator) and not inside:
            found[name] = part
    return found


def parts_weights(module: nn.Module, attribute: str) -> Iterator[str]:
    """The names that the module's parts have in "x_weights" or "z_weights", as names from the module on."""
    for name, part in module.named_children():
        names = getattr(part, attribute, None)
        for weight in parts_weights(part, attribute) if names is None else names:
            yield f"{name}.{weight}"


def terms_of(integrator: Integrator) -> Terms:
    """The dense form of a part, or a FormError where it has none."""
    if not isinstance(integrator, BiAffine):
        raise FormError(f"{type(integrator).__name__} is not bi-affine: it has no terms()")
    return integrator.terms()


def check_parts(whole: Integrator, *parts: Integrator) -> None:
    """Raise an OptionError unless every part is an integrator."""
    for part in parts:
        if not isinstance(part, Integrator):
            raise OptionError(f"{type(whole).__name__}: got a {type(part).__name__}, expected an Integrator")


def build(
    owner: nn.Module,
    argument: str,
    factory: Callable[[int, int, int], Integrator],
    x_features: int,
    z_features: int,
    out_features: int,
) -> Integrator:
    """The integrator that an argument of the owner, a factory, gives for these sizes.

    Raises: OptionError where the factory gives something else; ShapeError where it gives other sizes.
    """
    check_factory(owner, argument, factory, "(X, Z, O) -> Integrator")
    integrator = factory(x_features, z_features, out_features)
    gives = f"{type(owner).__name__}: {argument} gives a {type(integrator).__name__}"
    if not isinstance(integrator, Integrator):
        raise OptionError(f"{gives}, expected a multint.Integrator")
    sizes, expected = (
        (integrator.x_features, integrator.z_features, integrator.out_features),
        (x_features, z_features, out_features),
    )
    if sizes != expected:
        raise ShapeError(f"{gives} of the sizes (X, Z, O) = {sizes}, expected {expected}")
    return integrator


def _present(term: Tensor) -> bool:
    """Whether a term is there: not zero, or able to become so by training."""
    return term.requires_grad or bool(term.any())
