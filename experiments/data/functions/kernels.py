"""Kernels of Gaussian processes, with hyper-parameters drawn anew for each function."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError

Range = tuple[float, float]
Parameters = tuple[Tensor, ...]  # (B, 1, 1) each


class Kernel(ABC):
    """A family of covariance functions k(x, x') in one dimension, without observation noise."""

    @abstractmethod
    def parameters(self, count: int, generator: torch.Generator) -> Parameters:
        """Hyper-parameters of so many functions, (count, 1, 1) each, float64."""

    @abstractmethod
    def covariance(
        self,
        difference: Tensor,  # (B, N, M): x − x'
        parameters: Parameters,
    ) -> Tensor:  # (B, N, M)
        """k at these differences."""

    @property
    def name(self) -> str:
        """What metrics call it."""
        return type(self).__name__.lower()


class RBF(Kernel):
    """k = s² exp(−d² / 2ℓ²), the exponentiated quadratic.

    Args:
        length: range of the length scale ℓ, drawn uniformly for each function.
        scale: the same of the standard deviation s.

    Raises: ExperimentError for a range that is empty or not positive.
    """

    def __init__(self, length: Range = (0.1, 0.6), scale: Range = (0.1, 1.0)) -> None:
        self.length, self.scale = _checked(self, "length", length), _checked(self, "scale", scale)

    def parameters(self, count: int, generator: torch.Generator) -> Parameters:
        return tuple(_drawn(bounds, count, generator) for bounds in (self.length, self.scale))

    def covariance(self, difference: Tensor, parameters: Parameters) -> Tensor:
        length, scale = parameters
        return scale.square() * (difference / length).square().mul_(-0.5).exp_()


class Matern52(Kernel):
    """k = s² (1 + √5·d/ℓ + 5d²/3ℓ²) exp(−√5·d/ℓ), Matérn's of ν = 5/2. Arguments and errors: see `RBF`."""

    def __init__(self, length: Range = (0.1, 0.6), scale: Range = (0.1, 1.0)) -> None:
        self.length, self.scale = _checked(self, "length", length), _checked(self, "scale", scale)

    def parameters(self, count: int, generator: torch.Generator) -> Parameters:
        return tuple(_drawn(bounds, count, generator) for bounds in (self.length, self.scale))

    def covariance(self, difference: Tensor, parameters: Parameters) -> Tensor:
        length, scale = parameters
        d = math.sqrt(5) * difference.abs() / length
        return scale.square() * (1 + d + d.square() / 3) * d.neg().exp()


class Periodic(Kernel):
    """k = s² exp(−2 sin²(πd/p) / ℓ²).

    Args:
        length, scale: see `RBF`.
        period: range of the period p.

    Raises: ExperimentError for a range that is empty or not positive.
    """

    def __init__(self, length: Range = (0.1, 0.6), scale: Range = (0.1, 1.0), period: Range = (0.1, 0.5)) -> None:
        self.length, self.scale = _checked(self, "length", length), _checked(self, "scale", scale)
        self.period = _checked(self, "period", period)

    def parameters(self, count: int, generator: torch.Generator) -> Parameters:
        return tuple(_drawn(bounds, count, generator) for bounds in (self.length, self.scale, self.period))

    def covariance(self, difference: Tensor, parameters: Parameters) -> Tensor:
        length, scale, period = parameters
        return scale.square() * ((math.pi * difference / period).sin() / length).square().mul_(-2).exp_()


class WeaklyPeriodic(Kernel):
    """A periodic function whose shape drifts: the product of an `RBF` kernel and a `Periodic` one, s = 1.

    The defaults are those of Foong et al. 2020, with the settings of their public code.

    Args:
        length: ℓ of the RBF kernel.
        periodic_length: ℓ of the periodic one.
        period: its period.

    Raises: ExperimentError for a range that is empty or not positive.
    """

    def __init__(
        self, length: Range = (0.5, 0.5), periodic_length: Range = (1.0, 1.0), period: Range = (0.25, 0.25)
    ) -> None:
        self.parts: tuple[Kernel, Kernel] = RBF(length, (1, 1)), Periodic(periodic_length, (1, 1), period)

    def parameters(self, count: int, generator: torch.Generator) -> Parameters:
        return tuple(value for part in self.parts for value in part.parameters(count, generator))

    def covariance(self, difference: Tensor, parameters: Parameters) -> Tensor:
        drift, periodic = self.parts
        return drift.covariance(difference, parameters[:2]) * periodic.covariance(difference, parameters[2:])


class Mixture(Kernel):
    """The sum of several `RBF` kernels of unit scale. With noise it is Foong et al.'s noisy mixture: ℓ = .25 and 1.

    Args:
        lengths: ℓ of each.

    Raises: ExperimentError for lengths that are missing or not positive.
    """

    def __init__(self, lengths: Sequence[float] = (0.25, 1.0)) -> None:
        if not lengths:
            raise ExperimentError("Mixture: got no lengths, expected at least one.")
        self.parts = [RBF((length, length), (1, 1)) for length in lengths]

    def parameters(self, count: int, generator: torch.Generator) -> Parameters:
        return tuple(value for part in self.parts for value in part.parameters(count, generator))

    def covariance(self, difference: Tensor, parameters: Parameters) -> Tensor:
        pairs = zip(self.parts, parameters[::2], parameters[1::2], strict=True)
        return torch.stack([part.covariance(difference, of_part) for part, *of_part in pairs]).sum(0)


def _checked(owner: Kernel, name: str, bounds: Range) -> Range:
    low, high = bounds
    if not 0 < low <= high < math.inf:
        raise ExperimentError(
            f"{type(owner).__name__}: {name} is {low} to {high}, expected two positive numbers, the lower one first."
        )
    return low, high


def _drawn(bounds: Range, count: int, generator: torch.Generator) -> Tensor:
    """Uniform between the bounds, (count, 1, 1)."""
    low, high = bounds
    return low + (high - low) * torch.rand(count, 1, 1, dtype=torch.float64, generator=generator)
