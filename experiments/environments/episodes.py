"""Dynamics in gymnasium's API: many copies at once, or one alone."""

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from experiments.core.task import Stage
from experiments.environments.dynamics import Dynamics

Observation = dict[str, np.ndarray]


class Episodes(VectorEnv):
    """Copies of dynamics, which step together.

    In training each episode draws its context, at random, from those of the training. In an evaluation there are as
    many copies as contexts, and each has its own for good.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, dynamics: Dynamics, copies: int, stage: Stage = "train") -> None:
        self.dynamics, self.num_envs, self.stage = dynamics, copies, stage
        self.single_observation_space = _observation_space(dynamics)
        self.single_action_space = spaces.Box(-1.0, 1.0, (dynamics.action_features,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, copies)
        self.action_space = batch_space(self.single_action_space, copies)
        self._contexts = dynamics.contexts(stage)
        self._context = np.zeros((copies, self._contexts.shape[1]))
        self._state = np.zeros((copies, len(dynamics.state_bounds)))
        self._steps = np.zeros(copies, np.int64)
        self._is_over = np.zeros(copies, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._begin(np.ones(self.num_envs, bool))
        return self._observation(), {}

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        begins = self._is_over
        within = np.clip(np.asarray(actions, np.float64), -1.0, 1.0)
        self._state, rewards = self.dynamics.move(self._state, within, self._context)
        self._steps += 1
        if begins.any():
            self._begin(begins)
            rewards = np.where(begins, 0.0, rewards)
        self._is_over = self._steps >= self.dynamics.horizon
        ended = np.zeros(self.num_envs, bool)
        return self._observation(), rewards, ended, self._is_over, {}

    def state_dict(self) -> dict[str, Any]:
        """Where each episode is, and the generator's state, as plain values and tensors."""
        arrays = {"context": self._context, "state": self._state, "steps": self._steps, "is_over": self._is_over}
        return {
            "generator": self.np_random.bit_generator.state,
            **{name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.np_random.bit_generator.state = state["generator"]
        self._context, self._state = (state[name].numpy().copy() for name in ("context", "state"))
        self._steps, self._is_over = (state[name].numpy().copy() for name in ("steps", "is_over"))

    def _begin(self, chosen: np.ndarray) -> None:
        """Begin new episodes in the chosen copies."""
        count = int(chosen.sum())
        if self.stage == "train":
            contexts = self._contexts[self.np_random.integers(len(self._contexts), size=count)]
        else:
            contexts = self._contexts[chosen]
        self._context[chosen] = contexts
        self._state[chosen] = self.dynamics.start(contexts, self.stage, self.np_random)
        self._steps[chosen] = 0

    def _observation(self) -> Observation:
        shown = self.dynamics.shown(self._context)
        return {"context": shown.astype(np.float32), "observation": self._state.astype(np.float32)}


class Episode(gymnasium.Env):
    """One copy of dynamics, as a `gymnasium.Env`."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, dynamics: Dynamics) -> None:
        self._episodes = Episodes(dynamics, 1)
        self.observation_space = self._episodes.single_observation_space
        self.action_space = self._episodes.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._episodes._np_random = self.np_random
        observation, info = self._episodes.reset()
        return _first(observation), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, [reward], [ended], [is_cut], info = self._episodes.step(np.asarray(action)[None])
        return _first(observation), float(reward), bool(ended), bool(is_cut), info


def _observation_space(dynamics: Dynamics) -> spaces.Dict:
    bounds = {"context": dynamics.context_bounds, "observation": dynamics.state_bounds}
    return spaces.Dict({name: spaces.Box(-b.astype(np.float32), b.astype(np.float32)) for name, b in bounds.items()})


def _first(observation: Observation) -> Observation:
    return {name: rows[0] for name, rows in observation.items()}
