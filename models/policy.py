"""Policies and values of actions in a context: actor and critics that share one kind of network."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multint import Concat, Integrator
from multint.integrators.base import build
from multint.integrators.checks import positive

_LOG_STD = (-5.0, 2.0)


class MeetingMLP(Integrator):
    """An MLP of x that the context meets in its middle: y = P φ(f(φ(Vx + b), c)) + d, with φ a ReLU.

    `Concat` for f gives the middle layer [φ(Vx + b); c], `Hadamard` the gain-only gate, `Projected` FiLM. In a
    `Conditional` every layer reads the context instead, so that with products y is a polynomial of it.

    Args:
        hidden: H, width of both hidden layers.
        integrator: factory `(H, C, H) -> Integrator` of f.

    Raises: OptionError for a number of features below 1; ShapeError for streams that do not fit.
    """

    z_name = "context"

    def __init__(
        self,
        x_features: int,
        context_features: int,
        out_features: int,
        hidden: int = 256,
        integrator: Callable[[int, int, int], Integrator] = Concat,
    ) -> None:
        super().__init__(x_features, context_features, out_features)
        positive(self, "hidden", hidden)
        self.first = nn.Linear(x_features, hidden)
        self.meeting = build(self, "integrator", integrator, hidden, context_features, hidden)
        self.last = nn.Linear(hidden, out_features)

    @property
    def x_weights(self) -> tuple[str, ...]:
        """x goes through the first layer alone."""
        return ("first.weight",)

    @property
    def z_weights(self) -> tuple[str, ...]:
        """Those of f."""
        return tuple(f"meeting.{name}" for name in self.meeting.z_weights)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., C)
    ) -> Tensor:  # (..., O)
        return self.last(torch.relu(self.meeting(torch.relu(self.first(x)), z)))


class Action(NamedTuple):
    """A drawn action and log π(a | o, c)."""

    value: Tensor  # (..., A) within ± 1
    log_density: Tensor  # (...,)


class Actor(nn.Module):
    """A policy: a = tanh(μ + σ ⊙ ε) with normal ε, where f(o, c) = (μ, s) and log σ lies in [−5, 2] by a tanh of s.

    Called, it gives the policy's middle, tanh μ.

    Args:
        network: factory `(X, C, 2A) -> Integrator` of f: how observation and context meet.

    Shapes: o (..., X), c (..., C), a (..., A).
    Raises: OptionError for a number of features below 1; ShapeError for streams that do not fit.
    Source: Haarnoja et al. 2018, appendix C.
    """

    def __init__(
        self,
        observation_features: int,
        context_features: int,
        action_features: int,
        network: Callable[[int, int, int], Integrator],
    ) -> None:
        super().__init__()
        self.action_features = positive(self, "action_features", action_features)
        self.network = build(self, "network", network, observation_features, context_features, 2 * action_features)

    def forward(
        self,
        observation: Tensor,  # (..., X)
        context: Tensor,  # (..., C)
    ) -> Tensor:  # (..., A)
        return self.network(observation, context)[..., : self.action_features].tanh()

    def sample(
        self,
        observation: Tensor,  # (..., X)
        context: Tensor,  # (..., C)
        noise: Tensor | None = None,  # (..., A) ε; drawn if None
    ) -> Action:
        """An action drawn from the policy, differentiable with respect to its weights."""
        mean, s = self.network(observation, context).chunk(2, dim=-1)
        least, most = _LOG_STD
        log_std = least + (most - least) / 2 * (s.tanh() + 1)
        noise = torch.randn_like(mean) if noise is None else noise
        u = mean + log_std.exp() * noise
        # log(1 − tanh² u), written so that it stays finite where tanh u rounds to ± 1.
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        log_density = -(noise.square() + math.log(2 * math.pi)) / 2 - log_std - log_slope
        return Action(u.tanh(), log_density.sum(-1))


class Critic(nn.Module):
    """The value Q = f([o; a], c) of an action.

    Args:
        network: factory `(X + A, C, 1) -> Integrator` of f.

    Raises: OptionError for a number of features below 1; ShapeError for streams that do not fit.
    """

    def __init__(
        self,
        observation_features: int,
        context_features: int,
        action_features: int,
        network: Callable[[int, int, int], Integrator],
    ) -> None:
        super().__init__()
        self.network = build(self, "network", network, observation_features + action_features, context_features, 1)

    def forward(
        self,
        observation: Tensor,  # (..., X)
        context: Tensor,  # (..., C)
        action: Tensor,  # (..., A)
    ) -> Tensor:  # (...,)
        return self.network(torch.cat([observation, action], dim=-1), context).squeeze(-1)


class ActorCritic(nn.Module):
    """What soft actor-critic learns: an actor, two critics, the temperature, and slow copies of the critics.

    Called, it gives the policy's middle.

    Args:
        network: factory `(X, C, O) -> Integrator` of the actor's and both critics' networks, such as a `Conditional`.

    Raises: OptionError for a number of features below 1; ShapeError for streams that do not fit.
    Source: Haarnoja et al. 2018; Fujimoto et al. 2018 for the second critic.
    """

    def __init__(
        self,
        observation_features: int,
        context_features: int,
        action_features: int,
        network: Callable[[int, int, int], Integrator],
    ) -> None:
        super().__init__()
        sizes = observation_features, context_features, action_features
        self.actor = Actor(*sizes, network)
        self.critics = nn.ModuleList(Critic(*sizes, network) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        observation: Tensor,  # (..., X)
        context: Tensor,  # (..., C)
    ) -> Tensor:  # (..., A)
        return self.actor(observation, context)

    def values(
        self,
        observation: Tensor,  # (..., X)
        context: Tensor,  # (..., C)
        action: Tensor,  # (..., A)
    ) -> list[Tensor]:  # (...,) each
        """What each critic says."""
        return [critic(observation, context, action) for critic in self.critics]

    @torch.no_grad()
    def target(
        self,
        observation: Tensor,  # (..., X)
        context: Tensor,  # (..., C)
        action: Tensor,  # (..., A)
    ) -> Tensor:  # (...,)
        """The lesser of what the slow copies say."""
        first, second = (critic(observation, context, action) for critic in self.targets)
        return torch.minimum(first, second)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the slow copies by this share of the way towards the critics."""
        torch._foreach_lerp_(list(self.targets.parameters()), list(self.critics.parameters()), rate)

    @contextmanager
    def constant_critics(self) -> Iterator[None]:
        """Within, nothing that is computed has a gradient for the critics' weights, which saves that work."""
        parameters = [p for p in self.critics.parameters() if p.requires_grad]
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
