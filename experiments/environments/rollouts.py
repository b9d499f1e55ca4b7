"""What a policy with a memory learns from: it plays a while, and learns from that before it goes on."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments.core.errors import ExperimentError
from experiments.environments.environment import Environment, Spaces, Streams, checked_rewards, playing

_RECENT = 100  # episodes that the training's returns are told of


class Acted(NamedTuple):
    """What a policy does in a step, and what it thinks."""

    action: Tensor  # (N, A), of which the environment cuts off what is beyond ± 1, or (N,) from 0 if discrete
    log_density: Tensor  # (N,) log π of it
    value: Tensor  # (N,)
    state: Any  # the memory's after the step


# Of what is seen, which copies begin an episode (N,), the memory's state (None at first), and a generator.
Act = Callable[[Streams, Tensor, Any, torch.Generator], Acted]


class Sequences(NamedTuple):
    """T steps of B copies, with the policy's memory before them."""

    observation: Tensor  # (T, B, X)
    context: Tensor  # (T, B, C)
    begins: Tensor  # (T, B) bool: this step begins an episode
    is_step: Tensor  # (T, B) bool: the policy acted. Not so where the copy only goes over to its next episode
    action: Tensor  # (T, B, A), or (T, B) if discrete
    log_density: Tensor  # (T, B) log π of it, of the policy that acted
    advantage: Tensor  # (T, B) of mean 0 and variance 1
    target: Tensor  # (T, B) what the value should be
    state: Any  # before the first step; None for the memory's initial one
    told: dict[str, float]  # the `frames` so far, and the last episodes' `return`, `length` and `success`


class Rollouts:
    """Batches of sequences to train on, `epoch` of them to a pass.

    All copies play `steps` steps by the policy, and what came of it is given in batches, `passes` times over, in an
    order that is drawn each time. Then they play on. A copy that goes over to its next episode spends a step on that.

    It resumes within a pass by Lightning's protocol: see `Windows`. A checkpoint holds what was played last, the
    generator, the memory, and where each episode is; of an environment that cannot tell, the copies begin new episodes.

    Args:
        environment: played in `copies` copies.
        act: the policy.
        epoch: batches in a pass.
        steps: T, at least 2: one of two leads over to the next episode at most.
        batch_size: B, copies in a batch, which divides their number.
        passes: see above.
        discount, decay: γ and λ, see `advantages`.
        reward_scale: rewards are multiplied by it before anything is learnt from them.
        seed: of the environment, the actions and the order.

    Raises: ExperimentError for rewards and observations that are no finite numbers, and for a checkpoint of other
    sizes.
    """

    def __init__(
        self,
        environment: Environment,
        act: Act,
        epoch: int,
        steps: int,
        batch_size: int,
        passes: int,
        copies: int,
        discount: float,
        decay: float,
        reward_scale: float,
        seed: int,
    ) -> None:
        self._env = environment.training(copies)
        self._spaces = Spaces.of(self._env, takes_discrete=True)
        self._rewards_success = environment.rewards_success
        self._act, self._epoch, self._steps, self._copies = act, epoch, steps, copies
        self._batch_size, self._passes = batch_size, passes
        self._discount, self._decay, self._reward_scale, self._seed = discount, decay, reward_scale, seed
        self._generator = torch.Generator().manual_seed(seed)
        self._given = self._frames = 0  # batches of all passes, and steps that the policy acted in
        self._seen: Streams | None = None  # by each copy; None before the first step
        self._memory: Any = None
        self._flags = torch.zeros(2, copies, dtype=torch.bool)  # the next step begins an episode; leads over to one
        self._episodes = torch.zeros(2, copies)  # return and length so far
        self._recent: list[list[float]] = []  # return and length
        self._played: Sequences | None = None
        self._order = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self._epoch

    def __iter__(self) -> Iterator[Sequences]:
        batches = self._passes * self._copies // self._batch_size
        for _ in range(self._epoch - self._given % self._epoch):
            if self._given % batches == 0:
                self._play()
            chosen = self._order.reshape(batches, -1)[self._given % batches]
            self._given += 1
            yield self._batch(chosen)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values and tensors."""
        env: Any = self._env
        is_told = hasattr(env, "state_dict") and self._seen is not None
        return {
            "sizes": self._sizes(),
            "counts": {"given": self._given, "frames": self._frames, "seed": self._seed},
            "generator": self._generator.get_state(),
            "environment": env.state_dict() if is_told else None,
            "seen": None if self._seen is None else [torch.from_numpy(part.copy()) for part in self._seen],
            "memory": self._memory,
            "flags": self._flags.clone(),
            "episodes": self._episodes.clone(),
            "recent": [list(episode) for episode in self._recent],
            "played": None if self._played is None else tuple(self._played),
            "order": self._order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, size in self._sizes().items():
            if (saved := state["sizes"][name]) != size:
                raise ExperimentError(
                    f"The checkpoint was saved with {name} {saved}, got {size}. Resume with the same settings."
                )
        self._given, self._frames, self._seed = (state["counts"][name] for name in ("given", "frames", "seed"))
        self._generator.set_state(state["generator"])
        self._recent, self._order = state["recent"], state["order"]
        self._played = None if state["played"] is None else Sequences(*state["played"])
        if state["environment"] is not None:
            env: Any = self._env
            env.reset(seed=self._seed)
            env.load_state_dict(state["environment"])
            self._seen = Streams(*(part.numpy().copy() for part in state["seen"]))
            self._memory = state["memory"]
            self._flags, self._episodes = state["flags"].clone(), state["episodes"].clone()

    def _sizes(self) -> dict[str, Any]:
        sizes = {"epoch": self._epoch, "steps": self._steps, "batch_size": self._batch_size, "passes": self._passes}
        return {**sizes, "copies": self._copies, "features": list(self._spaces.features)}

    def _play(self) -> None:
        """Let every copy take its steps, and draw the order in which they are given."""
        if self._seen is None:
            # Episodes that a resumed run begins are not those that the run began with.
            with playing():
                observation, _ = self._env.reset(seed=(self._seed + self._frames) % 2**32)
            self._seen = self._spaces.streams(observation)
            self._flags = torch.stack([torch.ones(self._copies), torch.zeros(self._copies)]).bool()
        start = self._memory
        steps = [self._step() for _ in range(self._steps)]
        seen, flags, acted, reward, ended, is_over = zip(*steps, strict=True)
        last = self._act(self._seen, self._flags[0], self._memory, self._generator)  # its value alone counts
        value = torch.stack([step.value for step in (*acted, last)])
        begins, leads_over = torch.stack(flags, 1)
        advantage = advantages(
            torch.stack(reward) * self._reward_scale,
            value,
            torch.stack(ended),
            torch.stack(is_over),
            self._discount,
            self._decay,
        )
        is_step = ~leads_over
        of_steps = advantage[is_step]
        self._played = Sequences(
            *(torch.stack([torch.from_numpy(part) for part in stream]) for stream in zip(*seen, strict=True)),
            begins,
            is_step,
            torch.stack([step.action for step in acted]),
            torch.stack([step.log_density for step in acted]),
            (advantage - of_steps.mean()) / (of_steps.std(correction=0) + 1e-8),
            advantage + value[:-1],
            start,
            self._told(),
        )
        orders = [torch.randperm(self._copies, generator=self._generator) for _ in range(self._passes)]
        self._order = torch.cat(orders)

    def _step(self) -> tuple[Streams, Tensor, Acted, Tensor, Tensor, Tensor]:
        """What was seen, the flags, what was done, the reward, and whether the episode ended, and is over."""
        assert self._seen is not None
        seen, flags = self._seen, self._flags
        acted = self._act(seen, flags[0], self._memory, self._generator)
        with playing():
            observation, rewards, ended, is_cut, _ = self._env.step(
                self._spaces.scaled(acted.action.numpy(), self._env)
            )
        self._seen, self._memory = self._spaces.streams(observation), acted.state
        reward = torch.from_numpy(checked_rewards(rewards))
        ended, is_over = torch.as_tensor(ended), torch.as_tensor(ended | is_cut)
        self._flags = torch.stack([flags[1], is_over])
        self._frames += int((~flags[1]).sum())
        self._episodes += torch.stack([reward, torch.ones(self._copies)]) * ~flags[1]
        self._recent = [*self._recent, *self._episodes[:, is_over].T.tolist()][-_RECENT:]
        self._episodes[:, is_over] = 0
        return seen, flags, acted, reward, ended, is_over

    def _told(self) -> dict[str, float]:
        told = {"frames": float(self._frames)}
        if self._recent:
            returns, lengths = np.array(self._recent).T
            told |= {"return": float(returns.mean()), "length": float(lengths.mean())}
            if self._rewards_success:
                told["success"] = float((returns > 0).mean())
        return told

    def _batch(self, chosen: Tensor) -> Sequences:
        assert self._played is not None
        *parts, state, told = self._played
        return Sequences(
            *(part[:, chosen] for part in parts),
            pytree.tree_map_only(Tensor, lambda field: field[:, chosen], state),
            told,
        )


def advantages(
    reward: Tensor,  # (T, N)
    value: Tensor,  # (T + 1, N) of what is seen before each step, and after the last one
    ended: Tensor,  # (T, N) bool: nothing comes after the step
    is_over: Tensor,  # (T, N) bool: the episode ended, or a limit of steps cut it off
    discount: float,
    decay: float,
) -> Tensor:  # (T, N)
    """Generalised advantage estimation: A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t, with γ = 0 at an end.

    Where a limit cut an episode off, A_{t+1} is left out and V_{t+1} is not: of that more would have come.

    Source: Schulman et al. 2016.
    """
    errors = reward + discount * value[1:].masked_fill(ended, 0) - value[:-1]
    result, following = torch.empty_like(errors), torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        following = errors[t] + discount * decay * following.masked_fill(is_over[t], 0)
        result[t] = following
    return result
