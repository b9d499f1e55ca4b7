"""A point on a line that the action moves by a complex polynomial, whose coefficients are the context."""

from itertools import product

import numpy as np

from experiments.core.errors import ExperimentError
from experiments.core.task import Stage
from experiments.environments.simulation import Simulation

_WITHIN = (0.05, 0.1, 0.2, 0.5, 2.0)
_REWARDS = (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 20)


class ComplexODE(Simulation):
    """x ← x + 0.01 · Re(c₀ a + c₁ a²) for the complex action a = 10 (a₀ + i a₁), within ± 20, for 200 steps.

    The reward grows towards 0: 1 where |x| < .05, ½ below .1, ⅓ below .2, ¼ below .5 and .05 below 2. The agent sees x
    and c/5. Episodes of the training start at ± .5 or ± 1 with a context of {−1, 0, 1}² or {−5, 0, 5}² but 0; the
    validation is of these 16 from x = 1, the test of the 21 × 21 in [−10, 10]² from there. Over the test a greedy
    controller gets 199.5, who does nothing 10.0, random actions about 4.3.

    Args:
        training_contexts: others to train on and to validate with, as pairs (c₀, c₁).

    Raises: ExperimentError for contexts that are no pairs of finite numbers.
    Source: Beukman et al. 2023.
    """

    horizon = 200
    state_bounds, context_bounds = np.array([20.0]), np.array([2.0, 2.0])
    action_features = 2

    def __init__(self, training_contexts: list[tuple[float, float]] | None = None) -> None:
        pairs = [pair for size in (1.0, 5.0) for pair in product((-size, 0.0, size), repeat=2) if pair != (0.0, 0.0)]
        given = pairs if training_contexts is None else training_contexts
        self._training = np.array(given, np.float64)
        if self._training.shape != (len(given), 2) or not np.isfinite(self._training).all():
            raise ExperimentError(f"ComplexODE: training_contexts are {given}, expected pairs of finite numbers.")
        self.context_bounds = np.maximum(2.0, np.abs(self._training).max(0) / 5)

    def contexts(self, stage: Stage) -> np.ndarray:
        if stage == "test":
            return np.array(list(product(np.linspace(-10, 10, 21), repeat=2)))
        return self._training

    def start(self, contexts: np.ndarray, stage: Stage, generator: np.random.Generator) -> np.ndarray:
        if stage != "train":
            return np.ones((len(contexts), 1))
        return generator.choice([-1.0, -0.5, 0.5, 1.0], (len(contexts), 1))

    def move(self, state: np.ndarray, action: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a = 10 * (action[:, 0] + 1j * action[:, 1])
        step = 0.01 * (context[:, 0] * a + context[:, 1] * a**2).real
        state = np.clip(state + step[:, None], -20.0, 20.0)
        distance = np.abs(state[:, 0])
        return state, np.select([distance < within for within in _WITHIN], _REWARDS, 0.0)

    def shown(self, context: np.ndarray) -> np.ndarray:
        return context / 5
