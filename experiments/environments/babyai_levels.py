"""BabyAI's levels in gymnasium's API, as this project's policies see them: one alone, or many that step together."""

import re
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

from experiments.core.errors import ExperimentError
from experiments.core.task import Stage

_SPOKEN = """
    a after and ball behind blue box door front go green grey in key left next object of on open pick purple put red
    right the then to up yellow you your
"""
WORDS = {word: number for number, word in enumerate(_SPOKEN.split(), 1)}  # their numbers; 0 is no word
_LENGTH = 72  # the longest: four times `put a purple ball in front of you next to a …`, and what joins them
_VIEW = 7
_SYMBOLS = len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX)
_SEEDS = {"train": 2**30, "val": 0, "test": 2**29}  # the first of 2²⁹ seeds, of which episodes are made

Observation = dict[str, np.ndarray]


class Instructed(gymnasium.Env):
    """Episodes of levels that are drawn evenly. Observations are `image`, and `context`: the numbers of the words.

    Args:
        levels: their ids.
        stage: episodes are of other seeds in each.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, levels: list[str], stage: Stage) -> None:
        self._envs = [gymnasium.make(level, disable_env_checker=True).unwrapped for level in levels]
        self._first_seed = _SEEDS[stage]
        self._level = self._seed = 0  # of the episode under way: with its actions they determine it
        self._actions: list[int] = []
        highest = np.broadcast_to(np.array(_SYMBOLS, np.int64) - 1, (_VIEW, _VIEW, len(_SYMBOLS)))
        self.observation_space = spaces.Dict(
            {
                "context": spaces.Box(0, len(WORDS), (_LENGTH,), np.int64),
                "image": spaces.Box(np.zeros_like(highest), highest, dtype=np.int64),
            }
        )
        self.action_space = self._env.action_space

    @property
    def instruction(self) -> str:
        """What the agent is told."""
        return self._env.mission

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._level = int(self.np_random.integers(len(self._envs)))
        self._seed = self._first_seed + int(self.np_random.integers(2**29))
        return self._begin(), {}

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self._actions.append(int(action))
        seen, reward, ended, is_cut, _ = self._env.step(action)
        return self._observation(seen), float(reward), ended, is_cut, {}

    def render(self) -> np.ndarray:  # (rows, columns, 3)
        """The world, what the agent sees being lighter."""
        return self._env.get_frame(tile_size=16)

    def action_name(self, action: int) -> str:
        """What it is called."""
        return self._env.actions(action).name

    def state_dict(self) -> dict[str, Any]:
        """How the episode under way came about, and the generator's state, as plain values."""
        generator = self.np_random.bit_generator.state
        return {"generator": generator, "level": self._level, "seed": self._seed, "actions": list(self._actions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: the episode is played again up to it."""
        self.np_random.bit_generator.state = state["generator"]
        self._level, self._seed = state["level"], state["seed"]
        self._begin()
        for action in state["actions"]:
            self.step(action)

    @property
    def _env(self) -> Any:
        return self._envs[self._level]

    def _begin(self) -> Observation:
        self._actions = []
        with redirect_stdout(StringIO()):  # it prints each world that it threw away
            seen, _ = self._env.reset(seed=self._seed)
        words = re.findall("[a-z]+", seen["mission"])
        if unknown := sorted(set(words) - WORDS.keys()):
            raise ExperimentError(
                f"BabyAI: an instruction has the words {', '.join(unknown)}, expected those of BabyAI's levels."
            )
        self._context = np.zeros(_LENGTH, np.int64)
        self._context[: len(words)] = [WORDS[word] for word in words]
        return self._observation(seen)

    def _observation(self, seen: dict[str, Any]) -> Observation:
        return {"context": self._context.copy(), "image": seen["image"].astype(np.int64)}


class SideBySide(VectorEnv):
    """Copies that step together, and can say where each episode is.

    Args:
        copies: each steps by itself.
        rests: whether a copy does nothing more after its first episode, as an evaluation needs no others.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, copies: list[Instructed], rests: bool) -> None:
        self.copies, self.num_envs, self._rests = copies, len(copies), rests
        self.single_observation_space = copies[0].observation_space
        self.single_action_space = copies[0].action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._is_over = np.zeros(self.num_envs, bool)
        self._seen: list[Observation] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        self._seen = [copy.reset(seed=its_seed)[0] for copy, its_seed in zip(self.copies, seeds, strict=True)]
        self._is_over[:] = False
        return self._observation(), {}

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        rewards, flags = np.zeros(self.num_envs), np.zeros((2, self.num_envs), bool)
        for i, copy in enumerate(self.copies):
            if not self._is_over[i]:
                self._seen[i], rewards[i], flags[0, i], flags[1, i], _ = copy.step(actions[i])
            elif self._rests:
                flags[0, i] = True
            else:
                self._seen[i], _ = copy.reset()
        self._is_over = flags.any(0)
        return self._observation(), rewards, flags[0], flags[1], {}

    def state_dict(self) -> dict[str, Any]:
        """Where each episode is, as plain values and tensors."""
        return {
            "is_over": torch.from_numpy(self._is_over.copy()),
            "copies": [copy.state_dict() for copy in self.copies],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._is_over = state["is_over"].numpy().copy()
        for copy, of_copy in zip(self.copies, state["copies"], strict=True):
            copy.load_state_dict(of_copy)

    def _observation(self) -> Observation:
        return {name: np.stack([seen[name] for seen in self._seen]) for name in self.single_observation_space.spaces}
