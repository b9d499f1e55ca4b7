"""A neural process: from points of a function, a distribution over its values elsewhere."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.initialisation import Glorot
from models.neural_process.decoders import ConcatMLP
from models.neural_process.encoders import Encoder, Gaussian, LatentEncoder, PooledEncoder
from models.neural_process.points import Points, check_inputs, check_points
from multint import Integrator
from multint.errors import OptionError, ShapeError
from multint.integrators import build
from multint.integrators.checks import check_factory, positive

Part = TypeVar("Part", bound=nn.Module)


class NeuralProcess(nn.Module):
    """p(y_n | x_n, context) = N(μ_n, σ_n²): what the values of a function are where they were not seen.

        μ_n, s_n = decoder(x_n, [r_n; z])
        σ_n = floor + (1 − floor)·softplus(s_n − shift)

    r is what the encoder makes of the context, z ~ N(latent(context)) a draw that all targets share. With the encoder
    alone it is a conditional neural process (CNP), with both a latent one (NP), and with an `AttentiveEncoder` beside
    the latent path an attentive one (ANP). The encoders do not depend on the order of the points. Of an empty context
    they give what they learnt for it, so that the prediction is the prior.

    Args:
        encoder: factory `(X, Y) -> Encoder` of r, called on the context and the targets' x; None: there is no r.
        latent: factory `(X, Y) -> LatentEncoder` of z's distribution; None: there is no z.
        decoder: factory `(X, C, 2Y) -> Integrator`, called on x (..., X) and the context [r; z] (..., C).
        context_size: a linear map makes so many features of [r; z] for the decoder; None: they are its context as they
            are. A decoder with many parameters for each pair of features, as `Bilinear`, is small by it.
        floor: the smallest standard deviation. It caps a log-likelihood at −log(floor·√(2π)) for each value.
        shift: subtracted before the softplus, so that σ starts smaller.
        initialise: fills the linear layers anew after they are built; None leaves every part its own initialisation.

    Raises: OptionError without encoder and latent, for parts of another kind, and for settings out of range; ShapeError
    for points that do not fit.
    Source: Garnelo et al. 2018; Kim et al. 2019; the decoder as an integrator: Jayakumar et al. 2020, section 5.
    """

    def __init__(
        self,
        x_features: int,
        y_features: int,
        encoder: Callable[[int, int], Encoder] | None = PooledEncoder,
        latent: Callable[[int, int], LatentEncoder] | None = None,
        decoder: Callable[[int, int, int], Integrator] = ConcatMLP,
        context_size: int | None = None,
        floor: float = 0.1,
        shift: float = 0.0,
        initialise: Glorot | None = None,
    ) -> None:
        super().__init__()
        if encoder is None and latent is None:
            raise OptionError("NeuralProcess: it has no encoder and no latent path, expected at least one of them")
        if not 0 <= floor < 1:
            raise OptionError(f"NeuralProcess: floor is {floor}, expected a number in [0, 1)")
        self.x_features = positive(self, "x_features", x_features)
        self.y_features = positive(self, "y_features", y_features)
        self.floor, self.shift = floor, shift
        self.encoder = self._path("encoder", encoder, Encoder)
        self.latent = self._path("latent", latent, LatentEncoder)
        paths = [path for path in (self.encoder, self.latent) if path is not None]
        features = sum(path.out_features for path in paths)
        size = features if context_size is None else positive(self, "context_size", context_size)
        self.projection = nn.Identity() if context_size is None else nn.Linear(features, size)
        self.decoder = build(self, "decoder", decoder, x_features, size, 2 * y_features)
        if initialise is not None:
            initialise(self)

    def forward(
        self,
        context: Points,  # (B, C, ·)
        x: Tensor,  # (B, N, X)
        z: Tensor | None = None,  # (K, B, L): K draws of z, where there is a latent path
    ) -> Gaussian:  # (B, N, Y), or (K, B, N, Y)
        """The distribution of y at each x, for each draw of z."""
        check_points("NeuralProcess", "context", context, self.x_features, self.y_features)
        check_inputs("NeuralProcess", "x of the targets", x, self.x_features, "x_features")
        if len(x) != len(context.x):
            raise ShapeError(f"NeuralProcess: {len(context.x)} contexts and {len(x)} sets of targets, expected as many")
        if (z is None) != (self.latent is None):
            there = (
                "a latent path, and got no z: draw some from `prior`" if z is None else "no latent path, and got a z"
            )
            raise ShapeError(f"NeuralProcess: it has {there}")
        if self.latent is not None:
            self._check_draws(z, len(x))
        c = self.projection(self._context(context.filled(), x, z))
        mean, s = self.decoder(x, c).chunk(2, -1)
        return Gaussian(mean, self.floor + (1 - self.floor) * nn.functional.softplus(s - self.shift))

    def prior(
        self,
        points: Points,  # (B, N, ·)
    ) -> Gaussian:  # (B, L)
        """The distribution of z given these points: p(z | context), or of all points the posterior q."""
        if self.latent is None:
            raise OptionError("NeuralProcess: it has no latent path, so there is no distribution of z")
        check_points("NeuralProcess", "context", points, self.x_features, self.y_features)
        return self.latent(points.filled())

    def _path(self, argument: str, factory: Callable[[int, int], Part] | None, kind: type[Part]) -> Part | None:
        """The encoder that an argument, a factory, gives."""
        if factory is None:
            return None
        check_factory(self, argument, factory, f"(X, Y) -> {kind.__name__}")
        made = factory(self.x_features, self.y_features)
        if not isinstance(made, kind):
            raise OptionError(f"NeuralProcess: {argument} gives a {type(made).__name__}, expected {kind.__name__}")
        return made

    def _check_draws(self, z: Tensor | None, batch: int) -> None:
        """Raise a ShapeError unless they are draws of z for each task."""
        assert self.latent is not None
        expected = (batch, self.latent.out_features)
        if not isinstance(z, Tensor) or z.ndim != 3 or z.shape[1:] != expected:
            got = tuple(z.shape) if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise ShapeError(f"NeuralProcess: z is {got}, expected a tensor (K, {batch}, {expected[1]})")

    def _context(self, context: Points, x: Tensor, z: Tensor | None) -> Tensor:
        r = None if self.encoder is None else self.encoder(context, x)  # (B, 1 or N, F)
        if r is not None and (r.ndim != 3 or len(r) != len(x) or r.shape[1] not in (1, x.shape[1])):
            raise ShapeError(
                f"NeuralProcess: encoder gives {tuple(r.shape)}, expected ({len(x)}, {x.shape[1]}, F), or "
                f"({len(x)}, 1, F) for what all targets share"
            )
        if z is None:
            assert r is not None
            return r
        z = z.unsqueeze(-2)  # (K, B, 1, L)
        if r is None:
            return z
        shape = (*z.shape[:2], r.shape[-2])
        return torch.cat([r.expand(*shape, -1), z.expand(*shape, -1)], -1)
