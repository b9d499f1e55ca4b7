"""Policies of continuous actions: soft actor-critic, in environments whose episodes have a context each."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from experiments.core.errors import ExperimentError, building
from experiments.core.task import Mean, Stage
from experiments.environments import Environment, Experience, Streams, Transitions
from experiments.environments.evaluation import SEEDS, Played, play
from experiments.tasks.policy import PolicyTask
from models import ActorCritic
from multint import Integrator


class SoftActorCritic(PolicyTask):
    """Soft actor-critic: a step of training for each step that is played.

    Logged are the critics' and the actor's losses, the temperature α, and in evaluation `return`, the mean sum of an
    episode's rewards, of the policy's middle, and `return_sampled`, that of drawn actions. Each is over the episodes
    that the environment has for the validation or the test.

    The config's `max_steps` are those of training: `random_steps` more are played. A checkpoint holds the transitions
    played so far, and a run that goes on equals an uninterrupted one where the environment can tell its state.

    Args:
        environment: what is played.
        network: factory `(X, C, O) -> Integrator` for the actor and both critics: how observation and context meet.
        optimizer: see `Task`; its rate is the actor's.
        critic_rate: learning rate of the critics and of the temperature.
        discount: γ.
        follow_rate: τ, by which the critics' slow copies follow them in each step.
        batch_size: transitions in a batch.
        random_steps: steps of uniform actions before the training begins.
        capacity: transitions that are remembered, the last ones.
        copies: of the environment, stepped together. Of several, the policy that acts is up to so many updates old.
        epoch: steps between two validations.
        temperature: a fixed α; None lets it be learnt so that the policy's entropy is −A, A being the actions' number.
        halve_after: see `Task`.

    Raises: ExperimentError for a setting out of range, an environment without a context or with other spaces than
    boxes, for rewards that are no finite numbers, and for several processes.
    Source: Haarnoja et al. 2018; the settings of the ready configs are CleanRL's.
    """

    takes_discrete = False

    def __init__(
        self,
        environment: Environment,
        network: Callable[[int, int, int], Integrator],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        critic_rate: float = 1e-3,
        discount: float = 0.99,
        follow_rate: float = 0.005,
        batch_size: int = 256,
        random_steps: int = 5000,
        capacity: int = 1_000_000,
        copies: int = 1,
        epoch: int = 5000,
        temperature: float | None = None,
        halve_after: int | None = None,
    ) -> None:
        super().__init__(environment, network, optimizer, halve_after)
        sizes = {"batch_size": batch_size, "capacity": capacity, "copies": copies, "epoch": epoch}
        for name, size in sizes.items():
            if size < 1:
                raise ExperimentError(f"SoftActorCritic: {name} is {size}, expected at least 1.")
        if random_steps < 0:
            raise ExperimentError(f"SoftActorCritic: random_steps is {random_steps}, expected at least 0.")
        for name, share in {"discount": discount, "follow_rate": follow_rate}.items():
            if not 0 <= share <= 1:
                raise ExperimentError(f"SoftActorCritic: {name} is {share}, expected 0 to 1.")
        for name, positive in {"critic_rate": critic_rate, "temperature": temperature}.items():
            if positive is not None and not 0 < positive < float("inf"):
                raise ExperimentError(f"SoftActorCritic: {name} is {positive}, expected more than 0.")
        self.critic_rate, self.discount, self.follow_rate = critic_rate, discount, follow_rate
        self.batch_size, self.random_steps, self.capacity = batch_size, random_steps, capacity
        self.copies, self.epoch, self.temperature = copies, epoch, temperature

    def build(self, description: dict[str, Any]) -> nn.Module:
        network = ActorCritic(*description["features"], self._build_network)
        if self.temperature is not None:
            nn.init.constant_(network.log_temperature, np.log(self.temperature)).requires_grad_(False)
        return network

    def optimizer(self) -> Optimizer:
        network = self._network
        critics = [*network.critics.parameters(), network.log_temperature]
        groups: Any = [
            {"params": list(network.actor.parameters())},
            {"params": [p for p in critics if p.requires_grad], "lr": self.critic_rate},
        ]
        with building("SoftActorCritic: the optimizer"):
            return self._build_optimizer(groups)

    def train_dataloader(self) -> Experience:
        return Experience(
            self.environment,
            self._drawn,
            self.epoch,
            self.batch_size,
            self.random_steps,
            self.capacity,
            self.copies,
            self.seed("experience"),
        )

    def scores(self, played: Played) -> dict[str, np.ndarray]:
        return {"return": played.returns}

    def metrics(self, means: Mapping[str, Tensor], stage: Stage) -> Mapping[str, Tensor]:
        # The sum of losses that are minimised by different weights says nothing.
        return {name: mean for name, mean in means.items() if name != "loss"}

    def returns(self, stage: Literal["val", "test"], is_drawn: bool = False) -> np.ndarray:  # (N,)
        """The sum of the rewards of each episode of an evaluation, by drawn actions or by the policy's middle."""
        return self.play(stage, is_drawn).returns

    def play(self, stage: Literal["val", "test"], is_drawn: bool = False) -> Played:
        generator = torch.Generator().manual_seed(SEEDS[stage])
        return play(
            self.environment, stage, lambda seen: self._drawn(seen, generator) if is_drawn else self._middle(seen)
        )

    @property
    def _network(self) -> ActorCritic:
        assert isinstance(self.network, ActorCritic)
        return self.network

    def losses(self, batch: Transitions) -> dict[str, Mean]:
        network = self._network
        network.follow(self.follow_rate)  # the critics that the step before made
        alpha = network.log_temperature.detach().exp()
        with torch.no_grad():
            following = network.actor.sample(batch.next_observation, batch.next_context)
            value = network.target(batch.next_observation, batch.next_context, following.value)
            value = value - alpha * following.log_density
            target = batch.reward + self.discount * (1 - batch.ended) * value
        values = network.values(batch.observation, batch.context, batch.action)
        of_critics = sum(nn.functional.mse_loss(value, target) for value in values)
        action = network.actor.sample(batch.observation, batch.context)
        with network.constant_critics():
            lesser = torch.minimum(*network.values(batch.observation, batch.context, action.value))
        of_actor = (alpha * action.log_density - lesser).mean()
        excess = action.log_density.detach().mean() - action.value.shape[-1]
        # Each has a gradient for weights of its own, so that one step of their sum is a step of each.
        loss = of_critics + of_actor - network.log_temperature.exp() * excess
        told = {"loss": loss, "critic_loss": of_critics, "actor_loss": of_actor, "temperature": alpha}
        return {name: Mean(value, 1) for name, value in told.items()}  # of one step

    @torch.no_grad()
    def _drawn(self, seen: Streams, generator: torch.Generator) -> Tensor:
        actor, device = self._network.actor, self._network.log_temperature.device
        observation, context = (torch.from_numpy(part).to(device) for part in seen)
        noise = torch.randn(len(observation), actor.action_features, generator=generator)
        return _finite(actor.sample(observation, context, noise.to(device)).value)

    @torch.no_grad()
    def _middle(self, seen: Streams) -> Tensor:
        device = self._network.log_temperature.device
        observation, context = (torch.from_numpy(part).to(device) for part in seen)
        return _finite(self._network(observation, context))


def _finite(actions: Tensor) -> Tensor:
    """The actions, 0 where they are NaN: the run of a policy that diverged is reported by its loss."""
    return actions.cpu().nan_to_num()
