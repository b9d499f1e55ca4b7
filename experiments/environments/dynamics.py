"""Equations by which actions move a state, for many copies at once."""

from abc import ABC, abstractmethod

import numpy as np

from experiments.core.task import Stage


class Dynamics(ABC):
    """A state (N, S) that an action and the context move, by the equations alone, for N copies at once.

    The agent sees the whole state. A subclass has the sizes below, and gives `contexts`, `start` and `move`.
    """

    horizon: int  # steps of an episode, which is then cut off: it has no end of its own
    state_bounds: np.ndarray  # (S,): each state lies within ± this
    context_bounds: np.ndarray  # (C,): so does each context as the agent sees it
    action_features: int  # A; actions are within ± 1
    reward_bound: float = 1.0  # each reward lies within ± this

    @abstractmethod
    def contexts(self, stage: Stage) -> np.ndarray:  # (K, C)
        """Those of the training, of which each episode draws one, or those of an evaluation's episodes."""

    @abstractmethod
    def start(self, contexts: np.ndarray, stage: Stage, generator: np.random.Generator) -> np.ndarray:  # (N, S)
        """The states in which episodes of these contexts begin."""

    @abstractmethod
    def move(
        self,
        state: np.ndarray,  # (N, S)
        action: np.ndarray,  # (N, A) within ± 1
        context: np.ndarray,  # (N, C)
    ) -> tuple[np.ndarray, np.ndarray]:  # (N, S), (N,)
        """The next states, and the rewards for them."""

    def shown(self, context: np.ndarray) -> np.ndarray:
        """The contexts as the agent sees them."""
        return context
