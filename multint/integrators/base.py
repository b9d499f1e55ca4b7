"""What an integrator is, and the dense form that every bi-affine one has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from multint.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from multint.integrators.compose import Scaled, Sum, Through


class Integrator(nn.Module, ABC):
    """A map of two streams, `f(x, z) -> y`.

    Shapes: x (..., X), z (..., Z), y (..., O); the leading shapes broadcast against each other.

    `x_weights` and `z_weights` name the parameters through which a stream enters: with those at zero, `f` does not
    depend on that stream. Weight-drop and initialisers find the recurrent and the input matrices by them.

    Integrators form an algebra: `f + g`, `a * f` with a number a, and `f @ g`, which is `f(x, g(x, z))`.

    A subclass calls `check(x, z)` at the head of its `forward`.

    Raises: OptionError for a number of features below 1; ShapeError for streams that do not fit.
    """

    x_weights: tuple[str, ...] = ()
    z_weights: tuple[str, ...] = ()

    def __init__(self, x_features: int, z_features: int, out_features: int) -> None:
        super().__init__()
        self.x_features = positive(self, "x_features", x_features)
        self.z_features = positive(self, "z_features", z_features)
        self.out_features = positive(self, "out_features", out_features)

    @abstractmethod
    def forward(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        """The two streams' meeting."""

    def check(self, x: Tensor, z: Tensor) -> None:
        """Raise a ShapeError unless the features are as declared and the leading shapes broadcast."""
        check_features(self, "x", x, self.x_features, "x_features")
        check_features(self, "z", z, self.z_features, "z_features")
        if x.shape[:-1] != z.shape[:-1]:
            check_leading(self, x, z)

    def extra_repr(self) -> str:
        return f"{self.x_features}, {self.z_features}, {self.out_features}"

    def __add__(self, other: Integrator) -> Sum:
        from multint.integrators.compose import Sum

        return Sum(self, other) if isinstance(other, Integrator) else NotImplemented

    def __mul__(self, scale: float) -> Scaled:
        from multint.integrators.compose import Scaled

        return Scaled(scale, self) if isinstance(scale, int | float) else NotImplemented

    __rmul__ = __mul__

    def __matmul__(self, inner: Integrator) -> Through:
        from multint.integrators.compose import Through

        return Through(self, inner) if isinstance(inner, Integrator) else NotImplemented


class Terms(NamedTuple):
    """The dense form of a bi-affine map: f(x, z)_o = Σ_ij z_i W[o,i,j] x_j + Σ_i U[o,i] z_i + Σ_j V[o,j] x_j + b_o.

    Source: Jayakumar et al. 2020, written per output.
    """

    W: Tensor  # (O, Z, X)
    U: Tensor  # (O, Z)
    V: Tensor  # (O, X)
    b: Tensor  # (O,)

    def __call__(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        """Evaluate the dense form; the oracle of every integrator's test, not a fast path."""
        return torch.einsum("...i,oij,...j->...o", z, self.W, x) + z @ self.U.T + x @ self.V.T + self.b

    def __add__(self, other: Terms) -> Terms:  # type: ignore[override]
        """Add term by term (not a tuple's concatenation)."""
        return Terms(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))

    def scaled(self, scale: float) -> Terms:
        """Multiply every term by a number."""
        return Terms(*(scale * term for term in self))


class BiAffine(Integrator):
    """An integrator that is affine in x for fixed z and affine in z for fixed x, and so has a dense form."""

    @abstractmethod
    def terms(self) -> Terms:
        """The dense form, differentiable with respect to the parameters. O·Z·X numbers: for study, not for speed."""


def outermost_integrators(module: nn.Module) -> dict[str, Integrator]:
    """The module's integrators by name, without those inside another one, which alone knows their streams."""
    found: dict[str, Integrator] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        if isinstance(part, Integrator) and not inside:
            found[name] = part
    return found


def positive(owner: nn.Module, name: str, value: int) -> int:
    """The value, if it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{type(owner).__name__}: {name} is {value!r}, expected a whole number of at least 1")
    return value


def check_features(owner: nn.Module, stream: str, tensor: Tensor, features: int, name: str) -> None:
    """Raise a ShapeError unless the tensor's last dimension is `features`."""
    if tensor.ndim == 0 or tensor.shape[-1] != features:
        got = "no dimensions" if tensor.ndim == 0 else f"{tensor.shape[-1]} features"
        raise ShapeError(f"{type(owner).__name__}: {stream} has {got}, expected {features} ({name})")


def check_leading(owner: nn.Module, *streams: Tensor) -> None:
    """Raise a ShapeError unless the streams' leading shapes broadcast."""
    leading = [tuple(stream.shape[:-1]) for stream in streams]
    try:
        torch.broadcast_shapes(*leading)
    except RuntimeError:
        shown = " and ".join(map(str, leading))
        raise ShapeError(
            f"{type(owner).__name__}: the streams' leading shapes {shown} do not broadcast; "
            "expected equal sizes, or 1 where one stream is shared"
        ) from None
