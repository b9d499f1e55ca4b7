"""What a neural process makes of a context: one vector for a set, one for each target, or a distribution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.neural_process.attention import Attention
from models.neural_process.points import Points
from multint.errors import OptionError
from multint.integrators.checks import flag, positive


class Gaussian(NamedTuple):
    """Independent normal distributions."""

    mean: Tensor  # (..., F)
    std: Tensor  # (..., F)

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """So many draws, (samples, ..., F), differentiable with respect to the mean and the deviation."""
        shape = (samples, *self.mean.shape)
        noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def log_density(self, value: Tensor) -> Tensor:
        """log N(value; mean, std²) of each feature."""
        scaled = (value - self.mean) / self.std
        return -0.5 * scaled.square() - self.std.log() - 0.5 * math.log(2 * math.pi)

    def divergence(self, other: Gaussian) -> Tensor:
        """KL(self ‖ other) in nats, summed over the features, (...)."""
        ratio = (self.std / other.std).square()
        distance = ((self.mean - other.mean) / other.std).square()
        return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


class MLP(nn.Sequential):
    """So many linear layers with ReLU between them. Raises OptionError for a number below 1."""

    def __init__(self, in_features: int, hidden: int, out_features: int, layers: int) -> None:
        positive(self, "hidden", hidden)
        sizes = [in_features, *[hidden] * (positive(self, "layers", layers) - 1), out_features]
        parts: list[nn.Module] = []
        for size, following in pairwise(sizes):
            parts += [nn.Linear(size, following), nn.ReLU(inplace=True)]
        super().__init__(*parts[:-1])


class Encoder(nn.Module, ABC):
    """What a context is to each target: r_n = f(context, x_n). A subclass sets `out_features`, the features F of r."""

    out_features: int

    @abstractmethod
    def forward(
        self,
        context: Points,  # (B, C, ·), with zeros as padding
        x: Tensor,  # (B, N, X) of the targets
    ) -> Tensor:  # (B, N, F), or (B, 1, F) where it is the same for all
        """r of each target."""


class DeepSet(nn.Module):
    """ρ(mean_i φ(x_i, y_i)) with two MLPs: one vector for a set, whatever the order of its points.

    The mean of no points is 0: an empty set has the learnt vector ρ(0).

    Args:
        out_features: F of the vector.
        hidden: width of the layers.
        layers: linear layers of φ.
        post_layers: linear layers of ρ; 0: none, ρ is the identity.
        attention_heads: heads of a self-attention over the points, in the place of φ's last two layers; 0: none.

    Raises: OptionError for settings out of range.
    Source: Zaheer et al. 2017, theorem 2; Garnelo et al. 2018.
    """

    def __init__(
        self,
        x_features: int,
        y_features: int,
        out_features: int,
        hidden: int,
        layers: int,
        post_layers: int,
        attention_heads: int = 0,
    ) -> None:
        super().__init__()
        pooled = hidden if post_layers else out_features
        self.points = PointEncoder(x_features + y_features, hidden, pooled, layers, attention_heads, relu=True)
        self.post = MLP(hidden, hidden, out_features, post_layers) if post_layers else nn.Identity()

    def forward(
        self,
        points: Points,  # (B, N, ·)
    ) -> Tensor:  # (B, F)
        h, mask = self.points(points), points.mask
        if mask is None:
            return self.post(h.sum(-2) / max(h.shape[-2], 1))
        total = torch.where(mask.unsqueeze(-1), h, 0).sum(-2)
        return self.post(total / mask.sum(-1, keepdim=True).clamp(min=1))


class PointEncoder(nn.Module):
    """φ: an MLP of each point, or one whose last two layers are a self-attention over the set's points.

    Raises: OptionError for settings out of range.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        layers: int,
        attention_heads: int,
        relu: bool,  # between the MLP and the attention
    ) -> None:
        super().__init__()
        self.attention: Attention | None = None
        if not attention_heads:
            self.each = MLP(in_features, hidden, out_features, layers)
            return
        if layers < 3:
            raise OptionError(f"layers is {layers}, expected at least 3 where self-attention takes the place of two")
        self.each = MLP(in_features, hidden, hidden, layers - 2)
        if relu:
            self.each.append(nn.ReLU(inplace=True))
        self.attention = Attention(hidden, out_features, attention_heads)

    def forward(
        self,
        points: Points,
    ) -> Tensor:  # (B, N, F)
        h = self.each(torch.cat([points.x, points.y], -1))
        return h if self.attention is None else self.attention(h, h, h, points.mask)


class PooledEncoder(Encoder):
    """r = ρ(mean_i φ(x_i, y_i)): one vector for all targets. See `DeepSet`, and there for an empty context.

    Args:
        hidden: width of the layers, and features of r.
        layers: linear layers of φ.
        post_layers: linear layers of ρ.
        copies: so many such networks side by side; r joins their vectors.

    Raises: OptionError for settings out of range.
    Source: Garnelo et al. 2018 (Conditional Neural Processes).
    """

    def __init__(
        self,
        x_features: int,
        y_features: int,
        hidden: int = 128,
        layers: int = 4,
        post_layers: int = 2,
        copies: int = 1,
    ) -> None:
        super().__init__()
        positive(self, "copies", copies)
        sets = [DeepSet(x_features, y_features, hidden, hidden, layers, post_layers) for _ in range(copies)]
        self.sets = nn.ModuleList(sets)
        self.out_features = copies * hidden

    def forward(
        self,
        context: Points,
        x: Tensor,  # (B, N, X) of the targets
    ) -> Tensor:  # (B, 1, F)
        return torch.cat([of_set(context) for of_set in self.sets], -1).unsqueeze(-2)


class AttentiveEncoder(Encoder):
    """r_n = attention(k(x_n), k(x_i), φ(x_i, y_i)): each target reads the context points near to it.

    With no points to read, r_n is made of the target's own key.

    Args:
        hidden: width of the layers, and features of r.
        layers: linear layers of φ.
        key_layers: linear layers of k, which queries and keys share.
        heads: heads of the attention.
        self_attention: points read each other first, in the place of φ's last two layers.

    Raises: OptionError for settings out of range.
    Source: Kim et al. 2019 (Attentive Neural Processes); its settings as in Nguyen and Grover 2022.
    """

    def __init__(
        self,
        x_features: int,
        y_features: int,
        hidden: int = 128,
        layers: int = 4,
        key_layers: int = 2,
        heads: int = 8,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.keys = MLP(x_features, hidden, hidden, key_layers)
        own_heads = heads if flag(self, "self_attention", self_attention) else 0
        self.points = PointEncoder(x_features + y_features, hidden, hidden, layers, own_heads, relu=False)
        self.attention = Attention(hidden, hidden, heads)
        self.out_features = hidden

    def forward(
        self,
        context: Points,
        x: Tensor,  # (B, N, X) of the targets
    ) -> Tensor:  # (B, N, F)
        return self.attention(self.keys(x), self.keys(context.x), self.points(context), context.mask)


class LatentEncoder(nn.Module):
    """q(z | points) = N(μ, σ²) with (μ, s) = ρ(mean_i φ(x_i, y_i)) and σ = floor + (1 − floor)·sigmoid(s).

    Without points it is the prior, which is learnt: see `DeepSet`.

    Args:
        features: L, those of z.
        hidden: width of the layers.
        layers: linear layers of φ.
        post_layers: linear layers of ρ.
        attention_heads: heads of a self-attention over the points, in the place of φ's last two layers; 0: none.
        floor: the smallest standard deviation.

    Raises: OptionError for settings out of range.
    Source: Garnelo et al. 2018 (Neural Processes), with the σ of their public notebook.
    """

    def __init__(
        self,
        x_features: int,
        y_features: int,
        features: int = 128,
        hidden: int = 128,
        layers: int = 4,
        post_layers: int = 2,
        attention_heads: int = 0,
        floor: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= floor < 1:
            raise OptionError(f"LatentEncoder: floor is {floor}, expected a number in [0, 1)")
        self.floor, self.out_features = floor, positive(self, "features", features)
        self.set = DeepSet(x_features, y_features, 2 * features, hidden, layers, post_layers, attention_heads)

    def forward(
        self,
        points: Points,
    ) -> Gaussian:  # (B, L)
        mean, s = self.set(points).chunk(2, -1)
        return Gaussian(mean, self.floor + (1 - self.floor) * s.sigmoid())
