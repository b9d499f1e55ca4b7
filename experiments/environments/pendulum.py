"""Gymnasium's pendulum, with its physics as the context."""

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.environments.environment import Environment
from experiments.environments.gymnasium_environment import side_by_side

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv

_NOMINAL = np.array([10.0, 1.0, 1.0])  # gravity g, mass m, length l
_TRAINING, _TEST = (0.8, 1.0, 1.2), (0.7, 0.85, 1.0, 1.15, 1.3)


class Pendulum(Environment):
    """`Pendulum-v1` with gravity g, mass m and length l as the context, each divided by its usual value (10, 1, 1).

    Each of them is .8, 1 or 1.2 of that value in training and validation, and .7, .85, 1, 1.15 or 1.3 in the test.
    A run that goes on begins new episodes.
    """

    def training(self, copies: int) -> "VectorEnv":
        return side_by_side([partial(_pendulum, _grid(_TRAINING))] * copies)

    def evaluation(self, stage: Literal["val", "test"]) -> "VectorEnv":
        contexts = _grid(_TRAINING if stage == "val" else _TEST)
        return side_by_side([partial(_pendulum, context[None]) for context in contexts])


def _grid(of_each: tuple[float, ...]) -> np.ndarray:  # (K, 3)
    return np.array(list(product(of_each, repeat=3)))


def _pendulum(contexts: np.ndarray) -> "gymnasium.Env":
    import gymnasium

    from experiments.environments.pendulum_context import PendulumContext

    return PendulumContext(gymnasium.make("Pendulum-v1"), contexts)
