"""Playing the episodes of an evaluation."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from experiments.environments.environment import Environment, Spaces, Streams, checked_rewards, playing

SEEDS: dict[str, int] = {"val": 2718, "test": 314159}  # of the episodes, every time


class Played(NamedTuple):
    """The episodes of an evaluation, step by step."""

    contexts: np.ndarray  # (N, C) as the agent saw them when the episodes began
    observations: np.ndarray  # (T, N, X)
    actions: np.ndarray  # (T, N, A) within ± 1, or (T, N) if discrete
    rewards: np.ndarray  # (T, N), 0 after an episode's end
    are_part: np.ndarray  # (T, N): whether the episode had not ended before

    @property
    def returns(self) -> np.ndarray:  # (N,)
        """The sum of each episode's rewards."""
        return self.rewards.sum(0)


def play(
    environment: Environment,
    stage: Literal["val", "test"],
    act: Callable[[Streams], Tensor],
    takes_discrete: bool = False,
) -> Played:
    """All episodes of an evaluation, by a policy: what it does in each step, on a CPU."""
    env = environment.evaluation(stage)
    spaces = Spaces.of(env, takes_discrete)
    with playing():
        observation, _ = env.reset(seed=SEEDS[stage])
    is_playing = np.ones(env.num_envs, bool)
    steps, contexts = [], spaces.streams(observation).context
    while is_playing.any():
        seen = spaces.streams(observation)
        actions = act(seen).numpy()
        if not spaces.is_discrete:
            actions = np.clip(actions, -1, 1)  # of a normal policy, what the environment cuts off was not done
        with playing():
            observation, rewards, ended, is_cut, _ = env.step(spaces.scaled(actions, env))
        steps.append((seen.observation, actions, np.where(is_playing, checked_rewards(rewards), 0.0), is_playing))
        is_playing = is_playing & ~(ended | is_cut)
    env.close()
    return Played(contexts, *map(np.stack, zip(*steps, strict=True)))
