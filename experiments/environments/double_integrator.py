"""A mass that is pushed to a place, by actuators whose sign the context may flip."""

import numpy as np

from experiments.core.task import Stage
from experiments.environments.simulation import Simulation

_PLACES = 5  # where an evaluation's episodes start, of each context


class DoubleIntegrator(Simulation):
    """A mass m in the plane: v ← v + 0.1 · f a / m within ± 1, then p ← p + 0.1 · v, for 100 steps.

    The force a has two components within ± 1, and f, which is 1 or −1, flips it. The reward is 1 where |p| ≤ .1. The
    agent sees p, v, m and f. The 20 contexts of the training, and of the validation, are ten masses in [.5, 1.5] with
    both signs; the test has twenty in [.1, 2] with both. Episodes start at rest, those of the training with p uniform
    in [−1, 1]², those of an evaluation at five places on the circle of radius 1. (Where they start is our own choice.)

    Source: DMA*-SH, 2026, for the equations.
    """

    horizon = 100
    # Position can be no farther from its start than the greatest velocity takes it.
    state_bounds, context_bounds = np.array([11.0, 11.0, 1.0, 1.0]), np.array([2.0, 1.0])
    action_features = 2

    def contexts(self, stage: Stage) -> np.ndarray:
        masses = np.linspace(0.1, 2.0, 20) if stage == "test" else np.linspace(0.5, 1.5, 10)
        contexts = np.array([(mass, sign) for mass in masses for sign in (-1.0, 1.0)])
        return contexts if stage == "train" else np.repeat(contexts, _PLACES, axis=0)

    def start(self, contexts: np.ndarray, stage: Stage, generator: np.random.Generator) -> np.ndarray:
        rest = np.zeros((len(contexts), 2))
        if stage == "train":
            return np.concatenate([generator.uniform(-1.0, 1.0, rest.shape), rest], 1)
        angle = 2 * np.pi * np.arange(len(contexts)) / _PLACES
        return np.concatenate([np.cos(angle)[:, None], np.sin(angle)[:, None], rest], 1)

    def move(self, state: np.ndarray, action: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mass, sign = context[:, :1], context[:, 1:]
        velocity = np.clip(state[:, 2:] + 0.1 * np.clip(sign * action, -1.0, 1.0) / mass, -1.0, 1.0)
        position = state[:, :2] + 0.1 * velocity
        reward = (np.linalg.norm(position, axis=1) <= 0.1).astype(np.float64)
        return np.concatenate([position, velocity], 1), reward
