"""Simulations that do not tell their context."""

import numpy as np

from experiments.core.task import Stage
from experiments.environments.simulation import Simulation


class HiddenContext(Simulation):
    """Another simulation, whose context is told as zeros.

    The agent sees what it did last and the reward for that beside the state, zeros at first. So a policy with a memory
    can find out what the context must be; one without cannot.

    Args:
        environment: the other one.
    """

    def __init__(self, environment: Simulation) -> None:
        self._hidden = environment
        self.horizon, self.action_features = environment.horizon, environment.action_features
        self.context_bounds, self.reward_bound = environment.context_bounds, environment.reward_bound
        further = np.append(np.ones(self.action_features), self.reward_bound)
        self.state_bounds = np.concatenate([environment.state_bounds, further])

    def contexts(self, stage: Stage) -> np.ndarray:
        return self._hidden.contexts(stage)

    def start(self, contexts: np.ndarray, stage: Stage, generator: np.random.Generator) -> np.ndarray:
        nothing = np.zeros((len(contexts), self.action_features + 1))
        return np.concatenate([self._hidden.start(contexts, stage, generator), nothing], 1)

    def move(self, state: np.ndarray, action: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = len(self._hidden.state_bounds)
        state, rewards = self._hidden.move(state[:, :size], action, context)
        return np.concatenate([state, action, rewards[:, None]], 1), rewards

    def shown(self, context: np.ndarray) -> np.ndarray:
        return np.zeros_like(context)
