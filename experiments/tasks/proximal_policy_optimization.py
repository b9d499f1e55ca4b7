"""Policies with a memory: proximal policy optimisation, in environments that do not tell all."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.optim import Adam, Optimizer
from torch.utils import _pytree as pytree

from experiments.core.errors import ExperimentError
from experiments.core.task import Mean
from experiments.environments import Environment, Streams
from experiments.environments.evaluation import SEEDS, Played, play
from experiments.environments.rollouts import Acted, Rollouts, Sequences
from experiments.tasks.policy import PolicyTask
from models import RecurrentActorCritic
from multint import LSTM, Integrator
from multint.recurrent import Recurrent


class ProximalPolicyOptimization(PolicyTask):
    """Proximal policy optimisation: all copies play `steps` steps, from which `passes` passes of training are made.

    Minimised is −E min(ρA, clip(ρ, 1 ± ε) A) + w_v E (V − V̂)² / 2 − w_h E H, where ρ is the ratio of the policy's
    density to that of the policy that played, A the advantage, of mean 0 and variance 1 in what was played together, V̂
    the sum of advantage and value, and H the policy's entropy. Each copy's steps are one sequence, whose memory starts
    from the state in which it was played.

    Logged are the three parts, the divergence (`kl`) from the policy that played, `frames`, which are the steps played,
    and of the last 100 episodes `return`, `length` and, where it is known of an environment, the share of `success`. In
    evaluation they are of the policy's likeliest actions, and with `_sampled` of drawn ones, over the episodes that the
    environment has for the validation or the test.

    A checkpoint holds what was played last, and a run that goes on equals an uninterrupted one where the environment
    can tell its state.

    Args:
        environment: what is played.
        network: factory `(X, C, features) -> Integrator`: how observation and context meet.
        memory: factory `(features, hidden) -> Recurrent`, as of `LSTM` or `GRU`.
        features, hidden: see `RecurrentActorCritic`.
        optimizer, halve_after: see `Task`.
        copies: of the environment, stepped together.
        steps: that each copy plays before the training goes on, at least 2.
        batch_size: copies whose sequences are a batch; it divides their number.
        passes: over what was played.
        epoch: steps of training between two validations.
        discount, decay: γ, and λ of the generalised advantage estimation.
        clip: ε.
        value_weight, entropy_weight: w_v and w_h.
        reward_scale: the rewards are multiplied by it before they are learnt from; none that is logged.

    Raises: ExperimentError for a setting out of range, an environment without a context or with other actions than
    boxes or `Discrete`, for rewards that are no finite numbers, and for several processes.
    Source: Schulman et al. 2017.
    """

    takes_discrete = True

    def __init__(
        self,
        environment: Environment,
        network: Callable[[int, int, int], Integrator],
        memory: Callable[[int, int], Recurrent] = LSTM,
        features: int = 128,
        hidden: int = 128,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        copies: int = 64,
        steps: int = 40,
        batch_size: int = 32,
        passes: int = 4,
        epoch: int = 160,
        discount: float = 0.99,
        decay: float = 0.99,
        clip: float = 0.2,
        value_weight: float = 0.5,
        entropy_weight: float = 0.01,
        reward_scale: float = 1.0,
        halve_after: int | None = None,
    ) -> None:
        super().__init__(environment, network, optimizer, halve_after)
        sizes = {"copies": copies, "steps": steps, "batch_size": batch_size, "passes": passes, "epoch": epoch}
        for name, size in sizes.items():
            # Of one step alone a copy may spend all on going over to its next episode.
            if size < (least := 2 if name == "steps" else 1):
                raise ExperimentError(f"ProximalPolicyOptimization: {name} is {size}, expected at least {least}.")
        if copies % batch_size:
            raise ExperimentError(
                f"ProximalPolicyOptimization: batch_size is {batch_size}, expected a divisor of the {copies} copies."
            )
        for name, share in {"discount": discount, "decay": decay}.items():
            if not 0 <= share <= 1:
                raise ExperimentError(f"ProximalPolicyOptimization: {name} is {share}, expected 0 to 1.")
        for name, positive in {"clip": clip, "reward_scale": reward_scale}.items():
            if not 0 < positive < float("inf"):
                raise ExperimentError(f"ProximalPolicyOptimization: {name} is {positive}, expected more than 0.")
        for name, weight in {"value_weight": value_weight, "entropy_weight": entropy_weight}.items():
            if not 0 <= weight < float("inf"):
                raise ExperimentError(f"ProximalPolicyOptimization: {name} is {weight}, expected at least 0.")
        self.features, self.hidden = features, hidden
        self.copies, self.steps, self.batch_size, self.passes, self.epoch = (sizes[name] for name in sizes)
        self.discount, self.decay, self.clip, self.reward_scale = discount, decay, clip, reward_scale
        self.value_weight, self.entropy_weight = value_weight, entropy_weight
        self._build_memory = memory

    def build(self, description: dict[str, Any]) -> nn.Module:
        return RecurrentActorCritic(
            *description["features"],
            self._build_network,
            self._build_memory,
            self.features,
            self.hidden,
            description["is_discrete"],
        )

    def train_dataloader(self) -> Rollouts:
        return Rollouts(
            self.environment,
            self._act,
            self.epoch,
            self.steps,
            self.batch_size,
            self.passes,
            self.copies,
            self.discount,
            self.decay,
            self.reward_scale,
            self.seed("rollouts"),
        )

    def scores(self, played: Played) -> dict[str, np.ndarray]:
        succeeded = {"success": played.returns > 0} if self.environment.rewards_success else {}
        return {"return": played.returns, "length": played.are_part.sum(0), **succeeded}

    def play(self, stage: Literal["val", "test"], is_drawn: bool = False) -> Played:
        state, generator = None, torch.Generator().manual_seed(SEEDS[stage])

        def act(seen: Streams) -> Tensor:
            nonlocal state
            acted = self._act(seen, torch.zeros(len(seen.context), dtype=torch.bool), state, generator, is_drawn)
            state = acted.state
            return acted.action

        return play(self.environment, stage, act, self.takes_discrete)

    @property
    def _network(self) -> RecurrentActorCritic:
        assert isinstance(self.network, RecurrentActorCritic)
        return self.network

    def losses(self, batch: Sequences) -> dict[str, Mean]:
        policy, value, _ = self._network(batch.observation, batch.context, batch.begins, batch.state)
        counts = batch.is_step
        log_ratio = (policy.log_prob(batch.action) - batch.log_density)[counts]
        ratio, advantage = log_ratio.exp(), batch.advantage[counts]
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        of_policy = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        of_value = (value - batch.target)[counts].square().mean() / 2
        entropy = policy.entropy()[counts].mean()
        told = {
            "loss": of_policy + self.value_weight * of_value - self.entropy_weight * entropy,
            "policy_loss": of_policy,
            "value_loss": of_value,
            "entropy": entropy,
            "kl": (ratio - 1 - log_ratio).detach().mean(),  # an estimate that is never negative
            **{name: torch.tensor(number) for name, number in batch.told.items()},
        }
        return {name: Mean(number, 1) for name, number in told.items()}  # of one step

    @torch.no_grad()
    def _act(
        self, seen: Streams, begins: Tensor, state: Any, generator: torch.Generator, is_drawn: bool = True
    ) -> Acted:
        device = self.device
        observation, context = (torch.from_numpy(part).to(device)[None] for part in seen)
        judged = self._network(observation, context, begins.to(device)[None], _to(state, device))
        action = _drawn(judged.policy, generator) if is_drawn else judged.policy.mode
        log_density = judged.policy.log_prob(action)
        # An action of NaN is 0: the run of a policy that diverged is reported by its loss.
        of_step = action.nan_to_num(), log_density, judged.value
        return Acted(*(part[0].cpu() for part in of_step), _to(judged.state, torch.device("cpu")))


def _drawn(policy: Distribution, generator: torch.Generator) -> Tensor:
    """Actions drawn on a CPU, so that they depend on the generator alone."""
    if isinstance(policy, Categorical):
        chances = policy.probs.cpu().nan_to_num(nan=1.0)
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator)
        return drawn.reshape(chances.shape[:-1]).to(policy.probs.device)
    noise = torch.randn(policy.mean.shape, generator=generator).to(policy.mean)
    return policy.mean + policy.stddev * noise


def _to(state: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda field: field.to(device), state)
