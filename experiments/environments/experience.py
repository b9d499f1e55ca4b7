"""What a policy learns from: it plays, remembers all that happened, and draws batches from that."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.environments.environment import Environment, Spaces, Streams, checked_rewards, playing

Act = Callable[[Streams, torch.Generator], Tensor]  # actions (N, A) within ± 1


class Transitions(NamedTuple):
    """Steps of episodes: what was seen, what was done, and what came of it."""

    observation: Tensor  # (B, X)
    context: Tensor  # (B, C)
    action: Tensor  # (B, A) within ± 1
    reward: Tensor  # (B,)
    next_observation: Tensor  # (B, X)
    next_context: Tensor  # (B, C)
    ended: Tensor  # (B,) 1 where nothing comes after: not where a limit of steps cut the episode off


class Experience:
    """Batches of transitions to train on, one for each step that is played meanwhile, `epoch` of them to a pass.

    The first `random_steps` steps have uniform actions, and no batch is given before they are played. From then on the
    copies take a step together, by the policy, and a batch follows for each transition that came of it, drawn evenly
    from the last `capacity` ones.

    It resumes within a pass by Lightning's protocol: see `Windows`. A checkpoint holds the transitions, the generator,
    and where each episode is; of an environment that cannot tell, the copies begin new episodes.

    Args:
        environment: played in `copies` copies.
        act: the policy.
        epoch: batches in a pass.
        batch_size: transitions in a batch.
        random_steps, capacity: see above.
        seed: of the environment, the actions and the batches.

    Raises: ExperimentError for rewards and observations that are no finite numbers, and for a checkpoint of another
    capacity, of other copies or of other sizes.
    """

    def __init__(
        self,
        environment: Environment,
        act: Act,
        epoch: int,
        batch_size: int,
        random_steps: int,
        capacity: int,
        copies: int,
        seed: int,
    ) -> None:
        self._env = environment.training(copies)
        self._spaces = Spaces.of(self._env)
        self._act, self._epoch, self._batch_size, self._random_steps = act, epoch, batch_size, random_steps
        self._copies, self._seed = copies, seed
        self._generator = torch.Generator().manual_seed(seed)
        X, C, A = self._spaces.features
        self._widths = [X, C, A, 1, X, C, 1]
        self._rows = torch.empty(capacity, sum(self._widths))
        self._played = 0  # transitions, those that were overwritten too
        self._given = 0  # batches of all passes
        self._seen: Streams | None = None  # by each copy; None before the first step
        self._is_over = torch.zeros(copies, dtype=torch.bool)  # whether the next step begins a new episode

    def __len__(self) -> int:
        return self._epoch

    def __iter__(self) -> Iterator[Transitions]:
        for _ in range(self._epoch - self._given % self._epoch):
            while self._played < max(self._random_steps, 1) or self._played - self._random_steps <= self._given:
                self._play()
            self._given += 1
            yield self._draw()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values and tensors."""
        env: Any = self._env
        kept = self._rows[: self._played].clone()  # of a part, torch would save the whole
        seen = None if self._seen is None else [torch.from_numpy(part.copy()) for part in self._seen]
        return {
            "sizes": self._sizes(),
            "played": self._played,
            "given": self._given,
            "seed": self._seed,
            "transitions": kept,
            "generator": self._generator.get_state(),
            "environment": env.state_dict() if hasattr(env, "state_dict") and seen else None,
            "seen": seen,
            "is_over": self._is_over.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, size in self._sizes().items():
            if (saved := state["sizes"][name]) != size:
                raise ExperimentError(
                    f"The checkpoint was saved with {name} {saved}, got {size}. Resume with the same settings."
                )
        self._played, self._given, self._seed = state["played"], state["given"], state["seed"]
        self._rows[: len(state["transitions"])] = state["transitions"]
        self._generator.set_state(state["generator"])
        if state["environment"] is not None:
            env: Any = self._env
            env.reset(seed=self._seed)
            env.load_state_dict(state["environment"])
            self._seen = Streams(*(part.numpy().copy() for part in state["seen"]))
            self._is_over = state["is_over"].clone()

    def _sizes(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "capacity": len(self._rows), "copies": self._copies, "widths": self._widths}

    def _play(self) -> None:
        """Let every copy take a step, and remember those that are no beginnings of new episodes."""
        if self._seen is None:
            # Episodes that a resumed run begins are not those that the run began with.
            with playing():
                observation, _ = self._env.reset(seed=(self._seed + self._played) % 2**32)
            self._seen = self._spaces.streams(observation)
        A = self._spaces.features[2]
        if self._played < self._random_steps:
            actions = 2 * torch.rand(self._copies, A, generator=self._generator) - 1
        else:
            actions = self._act(self._seen, self._generator)
        with playing():
            observation, rewards, ended, is_cut, _ = self._env.step(self._spaces.scaled(actions.numpy(), self._env))
        seen = self._spaces.streams(observation)
        columns = [
            *map(torch.from_numpy, self._seen),
            actions,
            torch.from_numpy(checked_rewards(rewards))[:, None],
            *map(torch.from_numpy, seen),
            torch.as_tensor(ended, dtype=torch.float32)[:, None],
        ]
        transitions = torch.cat(columns, 1)[~self._is_over]
        places = (self._played + torch.arange(len(transitions))) % len(self._rows)
        self._rows[places] = transitions
        self._played += len(transitions)
        self._seen = seen
        self._is_over = torch.as_tensor(ended | is_cut)

    def _draw(self) -> Transitions:
        count = min(self._played, len(self._rows))
        rows = self._rows[torch.randint(count, (self._batch_size,), generator=self._generator)]
        o, c, a, reward, next_o, next_c, ended = rows.split(self._widths, 1)
        return Transitions(o, c, a, reward.squeeze(1), next_o, next_c, ended.squeeze(1))
