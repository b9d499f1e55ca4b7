"""BabyAI: a small world where an agent does what an instruction says."""

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from experiments.core.errors import ExperimentError, nearest_message
from experiments.core.task import Stage
from experiments.environments.environment import Environment, Film, needing_gymnasium

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from experiments.environments.babyai_levels import Instructed


class BabyAI(Environment):
    """Levels of BabyAI, the instruction being the context: several of them are one environment.

    The agent sees the 7 × 7 places before it, each as three symbols (object, colour, state), and the instruction as the
    numbers of its words. It has seven actions. An episode's reward is 1 − 0.9 · the share of its steps that it took, if
    it did what it was told, else 0: it succeeded if its return is above 0.

    Each episode of the training draws its level. The episodes of the validation, of which each level has an even share,
    are the same ones every time, those of the test others, and the training has neither.

    Args:
        levels: ids as minigrid registers them, such as `BabyAI-GoToRedBallGrey-v0`.
        episodes: of the validation, and of the test.

    Raises: ExperimentError for an unknown level, for no level, and without minigrid.
    Source: Chevalier-Boisvert et al. 2019.
    """

    rewards_success: ClassVar[bool] = True

    def __init__(self, levels: list[str], episodes: int = 512) -> None:
        if not levels:
            raise ExperimentError("BabyAI: levels is empty, expected ids such as BabyAI-GoToRedBallGrey-v0.")
        if episodes < 1:
            raise ExperimentError(f"BabyAI: episodes is {episodes}, expected at least 1.")
        self._levels, self._episodes = levels, episodes

    def training(self, copies: int) -> "VectorEnv":
        return self._made([self._levels] * copies, "train")

    def evaluation(self, stage: Literal["val", "test"]) -> "VectorEnv":
        return self._made([[self._levels[i % len(self._levels)]] for i in range(self._episodes)], stage)

    def film(self, stage: Literal["val", "test"], seed: int, actions: np.ndarray) -> Film:
        copy = self._copy(self._levels[:1], stage)
        copy.reset(seed=seed)
        frames, captions = [copy.render()], ["start"]
        for action in actions:
            copy.step(action)
            frames.append(copy.render())
            captions.append(copy.action_name(action))
        return Film(copy.instruction, frames, captions)

    def _made(self, levels: list[list[str]], stage: Stage) -> "VectorEnv":
        copies = [self._copy(of_copy, stage) for of_copy in levels]

        from experiments.environments.babyai_levels import SideBySide

        return SideBySide(copies, rests=stage != "train")

    def _copy(self, levels: list[str], stage: Stage) -> "Instructed":
        with needing_gymnasium():
            import gymnasium
            import minigrid  # noqa: F401  registers the levels

            from experiments.environments.babyai_levels import Instructed
        known = [id for id in gymnasium.registry if id.startswith("BabyAI-")]
        for level in levels:
            if level not in known:
                nearest = nearest_message(level, known) or "."
                raise ExperimentError(
                    f"BabyAI: there is no level {level!r}{nearest} Expected an id of minigrid's, such as "
                    "BabyAI-GoToRedBallGrey-v0."
                )
        return Instructed(levels, stage)
