"""Environments that are a few lines of NumPy."""

from typing import TYPE_CHECKING, Literal

from experiments.core.task import Stage
from experiments.environments.dynamics import Dynamics
from experiments.environments.environment import Environment, needing_gymnasium

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


class Simulation(Dynamics, Environment):
    """Dynamics whose copies step together. Its state is in checkpoints."""

    def training(self, copies: int) -> "VectorEnv":
        return self._episodes(copies, "train")

    def evaluation(self, stage: Literal["val", "test"]) -> "VectorEnv":
        return self._episodes(len(self.contexts(stage)), stage)

    def _episodes(self, copies: int, stage: Stage) -> "VectorEnv":
        with needing_gymnasium():
            from experiments.environments.episodes import Episodes

            return Episodes(self, copies, stage)
