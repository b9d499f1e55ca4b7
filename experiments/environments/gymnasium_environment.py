"""Any environment of gymnasium's whose observation tells a context."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from experiments.core.errors import ExperimentError, building, nearest_message
from experiments.core.trust import refusal
from experiments.environments.environment import Environment, needing_gymnasium

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv


class Gymnasium(Environment):
    """An environment by its id, whose observation space is a `Dict` with `context`.

    It draws its contexts itself, when an episode begins. The validation has so many episodes, the same ones every time,
    as far as the environment heeds seeds, and the test as many others. Its state is in no checkpoint: a run that goes
    on begins new episodes.

    Args:
        id: as registered, or `module:id` for one that importing a module registers, which must be trusted (`--trust`).
        settings: keyword arguments of `gymnasium.make`.
        episodes: of the validation, and of the test.

    Raises: ExperimentError for an unknown id or settings that do not fit, and without gymnasium.
    """

    def __init__(self, id: str, settings: dict[str, Any] | None = None, episodes: int = 20) -> None:
        if episodes < 1:
            raise ExperimentError(f"Gymnasium: episodes is {episodes}, expected at least 1.")
        module, separator, _ = id.rpartition(":")
        if separator and (reason := refusal(f"{module}.environment")):
            raise ExperimentError(f"Gymnasium: id: {reason}")
        self._id, self._settings, self._episodes = id, settings or {}, episodes

    def training(self, copies: int) -> "VectorEnv":
        return side_by_side([self._made] * copies)

    def evaluation(self, stage: Literal["val", "test"]) -> "VectorEnv":
        return side_by_side([self._made] * self._episodes)

    def _made(self) -> "gymnasium.Env":
        import gymnasium

        try:
            with building(f"Gymnasium: {self._id}"):
                env = gymnasium.make(self._id, **self._settings)
        except gymnasium.error.Error as error:
            nearest = nearest_message(self._id, gymnasium.registry) or "."
            raise ExperimentError(f"Gymnasium: {self._id}: {error}{nearest}") from error
        if env.spec is None or env.spec.max_episode_steps is None:
            raise ExperimentError(
                f"Gymnasium: {self._id} has no limit of steps, expected one, so that an evaluation ends. Give "
                "settings: {max_episode_steps: N}."
            )
        return env


def side_by_side(makers: "list[Callable[[], gymnasium.Env]]") -> "VectorEnv":
    """Single environments as the copies of one, in this process. Raises ExperimentError without gymnasium."""
    with needing_gymnasium():
        from gymnasium.vector import AutoresetMode, SyncVectorEnv

        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
