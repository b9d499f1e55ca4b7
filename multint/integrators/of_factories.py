"""The algebra's compositions as classes `(X, Z, O, **settings)`, so that a config can name them.

`Sum`, `Scaled`, `Through` and `Swapped` take integrators that are there already, with sizes of their own. Here the
parts are factories, as in `Normalised`, and get their sizes from the whole. Once built, nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from multint.errors import OptionError
from multint.integrators.base import Integrator, Scaled, Sum, Through, build
from multint.integrators.checks import positive
from multint.integrators.compose import Swapped


class SumOf(Sum):
    """y = f(x, z) + g(x, z). Starting with unit variance each, the two give y a variance of 2.

    Args:
        first, second: factories `(X, Z, O) -> Integrator` of f and g.

    Raises: ShapeError where a factory gives other sizes; FormError by `terms()` where a part has none.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        first: Callable[[int, int, int], Integrator],
        second: Callable[[int, int, int], Integrator],
    ) -> None:
        super().__init__(
            build(self, "first", first, x_features, z_features, out_features),
            build(self, "second", second, x_features, z_features, out_features),
        )


class ScaledOf(Scaled):
    """y = a·f(x, z) for a fixed number a; a = −1 in one part of a `SumOf` makes it a difference.

    Args:
        scale: a.
        integrator: factory `(X, Z, O) -> Integrator` of f.

    Raises: OptionError where a is no finite number; ShapeError where the factory gives other sizes; FormError by
    `terms()` where f has none.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        scale: float,
        integrator: Callable[[int, int, int], Integrator],
    ) -> None:
        super().__init__(scale, build(self, "integrator", integrator, x_features, z_features, out_features))


class SwappedOf(Swapped):
    """y = f(z, x): the streams change places, so f's x is z.

    Args:
        integrator: factory `(Z, X, O) -> Integrator` of f.

    Raises: ShapeError where the factory gives other sizes; FormError by `terms()` where f has none.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        integrator: Callable[[int, int, int], Integrator],
    ) -> None:
        super().__init__(build(self, "integrator", integrator, z_features, x_features, out_features))


class ThroughOf(Through):
    """y = f(x, g(x, z)): g's result m = g(x, z), with M features, takes z's place in f.

    With `SwappedOf(Diagonal)` for f and M = O, y = a(x) ⊙ g(x, z) + b(x): FiLM of any g, at any sizes. A `SwappedOf`
    around that lets z scale, and gives g its streams in the order (z, x).

    Args:
        outer: factory `(X, M, O) -> Integrator` of f.
        inner: factory `(X, Z, M) -> Integrator` of g.
        inner_features: M as a number, or "x", "z" or "out" for as many as that has. "z" is Krause's choice.

    Raises: OptionError for other inner_features; ShapeError where a factory gives other sizes; FormError by `terms()`
    where the whole is not bi-affine.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        outer: Callable[[int, int, int], Integrator],
        inner: Callable[[int, int, int], Integrator],
        inner_features: int | Literal["x", "z", "out"] = "z",
    ) -> None:
        sizes = {"x": x_features, "z": z_features, "out": out_features}
        if isinstance(inner_features, str):
            if inner_features not in sizes:
                raise OptionError(
                    f"ThroughOf: inner_features is {inner_features!r}, expected a whole number of at least 1, "
                    "or 'x', 'z' or 'out'"
                )
            inner_features = sizes[inner_features]
        features = positive(self, "inner_features", inner_features)
        super().__init__(
            build(self, "outer", outer, x_features, features, out_features),
            build(self, "inner", inner, x_features, z_features, features),
        )
