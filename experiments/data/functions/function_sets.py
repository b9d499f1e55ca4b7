"""Sets of functions to draw tasks from: curves of a process, images, and groups of rows."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.data.functions import gaussian_process
from experiments.data.functions.kernels import Kernel, Range

# (context x, context y, x) -> means (K, B, N, Y) of K samples, and their standard deviations.
Predict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Observed(NamedTuple):
    """Points of B functions, in random order."""

    x: Tensor  # (B, P, X)
    y: Tensor  # (B, P, Y)
    covariance: Tensor | None = None  # (B, P, P) of y given x, in float64, where that is known


class Functions(ABC):
    """A set of functions to draw tasks from.

    `x_features` and `y_features` are the sizes of a point, `count` the number of functions, None where there is no end.
    """

    x_features: int
    y_features: int
    count: int | None

    @abstractmethod
    def available(self, functions: Tensor) -> Tensor:
        """How many points each of these functions has, (B,) int64."""

    @abstractmethod
    def observe(self, functions: Tensor, points: int, generator: torch.Generator) -> Observed:
        """At least so many points of each of these functions, or all it has; the rest is padding."""


class GaussianProcess(Functions):
    """Curves y = f(x) + noise at uniform x, f from a Gaussian process of mean 0, its hyper-parameters new for each."""

    x_features = y_features = 1
    count = None

    def __init__(self, kernel: Kernel, noise: float, x_range: Range) -> None:
        self.kernel, self.noise, self.x_range = kernel, noise, x_range

    def available(self, functions: Tensor) -> Tensor:
        return torch.full((len(functions),), 2**31)

    def observe(self, functions: Tensor, points: int, generator: torch.Generator) -> Observed:
        count, (low, high) = len(functions), self.x_range
        x = low + (high - low) * torch.rand(count, points, dtype=torch.float64, generator=generator)
        covariance = self.covariance(x, self.kernel.parameters(count, generator))
        noise = torch.randn(count, points, 1, dtype=torch.float64, generator=generator)
        y = gaussian_process.cholesky(covariance) @ noise
        return Observed(x.float().unsqueeze(-1), y.float(), covariance)

    def covariance(
        self,
        x: Tensor,  # (B, N)
        parameters: tuple[Tensor, ...],
    ) -> Tensor:  # (B, N, N)
        """The covariance of observations at x, with their noise."""
        covariance = self.kernel.covariance(x.unsqueeze(-1) - x.unsqueeze(-2), parameters)
        covariance.diagonal(dim1=-2, dim2=-1).add_(self.noise**2)
        return covariance


class Pictures(Functions):
    """Grey images: x is the pixel's row and column in [−1, 1]², y its brightness in [0, 1]."""

    x_features, y_features = 2, 1

    def __init__(
        self,
        images: Tensor,  # (N, H, W) uint8
    ) -> None:
        self.images = images
        self.count: int | None = len(images)
        places = (torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in images.shape[1:])
        self.places = torch.cartesian_prod(*places)  # (H·W, 2)

    def available(self, functions: Tensor) -> Tensor:
        return torch.full((len(functions),), len(self.places))

    def observe(self, functions: Tensor, points: int, generator: torch.Generator) -> Observed:
        drawn = torch.rand(len(functions), len(self.places), generator=generator).argsort(-1)[:, :points]
        return Observed(self.places[drawn], self.values(functions).gather(1, drawn.unsqueeze(-1)))

    def values(self, functions: Tensor) -> Tensor:
        """The brightness of all pixels of these images, (B, H·W, 1)."""
        return self.images[functions].flatten(1).unsqueeze(-1) / 255


class Groups(Functions):
    """Groups of rows with ragged sizes."""

    def __init__(
        self,
        rows: list[tuple[Tensor, Tensor]],  # x (N_g, X) and y (N_g, Y) of each group
        names: list[str],
    ) -> None:
        self.names = names
        self.count: int | None = len(rows)
        self.sizes = torch.tensor([len(x) for x, _ in rows])
        self.x, self.y = (pad_sequence([pair[i] for pair in rows], batch_first=True).float() for i in range(2))
        self.x_features, self.y_features = self.x.shape[-1], self.y.shape[-1]

    def available(self, functions: Tensor) -> Tensor:
        return self.sizes[functions]

    def observe(self, functions: Tensor, points: int, generator: torch.Generator) -> Observed:
        order = torch.rand(len(functions), self.x.shape[1], generator=generator)
        order = order.masked_fill(torch.arange(self.x.shape[1]) >= self.sizes[functions].unsqueeze(-1), math.inf)
        drawn = order.argsort(-1)[:, :points].unsqueeze(-1)
        x, y = self.x[functions], self.y[functions]
        return Observed(*(values.gather(1, drawn.expand(-1, -1, values.shape[-1])) for values in (x, y)))
