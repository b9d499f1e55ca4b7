"""What an environment is: copies of it that are stepped together, to learn from and to be evaluated in."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

from experiments.core.errors import ExperimentError

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

INSTALL = "install the extra: pip install -c constraints.txt -e '.[policy]'"


class Environment(ABC):
    """Episodes in which an agent sees an observation and the context of the episode.

    `training` and `evaluation` give a `gymnasium.vector.VectorEnv` whose copies have observations of the space `Dict`,
    with `context` and others, actions of a bounded `Box` or of `Discrete`, and the autoreset mode `NEXT_STEP`. One that
    has `state_dict` and `load_state_dict` goes on within its episodes when a run is resumed; others begin new ones.
    """

    rewards_success: ClassVar[bool] = False  # whether an episode succeeded if its return is above 0

    @abstractmethod
    def training(self, copies: int) -> "VectorEnv":
        """So many copies; each episode of each draws its context from those of the training."""

    @abstractmethod
    def evaluation(self, stage: Literal["val", "test"]) -> "VectorEnv":
        """A copy for each episode of an evaluation; its first episode is the one that counts."""

    def film(self, stage: Literal["val", "test"], seed: int, actions: np.ndarray) -> "Film | None":
        """An evaluation's first episode in pictures, by the seed that it was begun with and the actions taken, as the
        policy gives them; None for an environment that has no pictures.
        """
        return None


class Film(NamedTuple):
    """An episode in pictures."""

    title: str
    frames: list[np.ndarray]  # (rows, columns, 3) at the start, and after each step
    captions: list[str]  # of each, such as the action that led to it


class Streams(NamedTuple):
    """What an agent sees, by copies."""

    observation: np.ndarray  # (N, X) float32
    context: np.ndarray  # (N, C) float32


class Spaces(NamedTuple):
    """The spaces of an environment, read once and checked."""

    observation_names: tuple[str, ...]  # the keys but `context`, in the order in which they are joined
    shapes: dict[str, tuple[int, ...]]
    low: np.ndarray  # (A,)
    high: np.ndarray  # (A,)
    is_discrete: bool  # whether an action is one of so many, the numbers from `low` to `high`

    @classmethod
    def of(cls, env: "VectorEnv", takes_discrete: bool = False) -> Self:
        """Raises ExperimentError for an environment without a context, with spaces that do not fit, or which begins new
        episodes in another way.

        Args:
            takes_discrete: whether its actions may be of the space `Discrete`.
        """
        from gymnasium import spaces
        from gymnasium.vector import AutoresetMode

        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.NEXT_STEP:  # the last observation of an episode would be taken from the next one
            raise ExperimentError(f"environment: its autoreset mode is {mode}, expected NEXT_STEP.")
        space, actions = env.single_observation_space, env.single_action_space
        if not isinstance(space, spaces.Dict) or "context" not in space.spaces or len(space.spaces) < 2:
            raise ExperimentError(
                f"environment: its observation space is {_shown(space)}, expected a Dict with `context` and at least "
                "one other entry. Wrap the environment so that it tells its context."
            )
        for name, part in space.spaces.items():
            if not isinstance(part, spaces.Box):
                raise ExperimentError(
                    f"environment: its observation has {name!r} in {_shown(part)}, expected a Box. Wrap the "
                    "environment."
                )
        shapes = {name: tuple(part.shape) for name, part in space.spaces.items()}
        others = tuple(sorted(set(shapes) - {"context"}))
        if takes_discrete and isinstance(actions, spaces.Discrete):
            first, last = actions.start, actions.start + actions.n - 1
            return cls(others, shapes, np.array([first]), np.array([last]), True)
        is_continuous = np.issubdtype(actions.dtype, np.floating)  # whole numbers would be cut off, unseen
        if not isinstance(actions, spaces.Box) or not is_continuous or not actions.is_bounded():
            raise ExperimentError(
                f"environment: its action space is {_shown(actions)}, expected a bounded Box of continuous actions"
                f"{', or Discrete' if takes_discrete else ''}."
            )
        low, high = (np.asarray(bound, np.float32).reshape(-1) for bound in (actions.low, actions.high))
        return cls(others, shapes, low, high, False)

    @property
    def features(self) -> tuple[int, int, int]:
        """X, C and A, which is the number of actions to choose from where they are discrete."""
        sizes = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        actions = int(self.high[0] - self.low[0]) + 1 if self.is_discrete else len(self.low)
        return sum(sizes[name] for name in self.observation_names), sizes["context"], actions

    def streams(self, observation: dict[str, np.ndarray]) -> Streams:
        """Raises ExperimentError for an observation of other sizes than the space says, or of no finite numbers."""
        rows = {}
        for name, shape in self.shapes.items():
            part = np.asarray(observation[name], np.float32)
            if part.shape[1:] != shape:
                raise ExperimentError(
                    f"environment: it gave {name!r} of the shape {part.shape[1:]}, expected {shape}, as its space says."
                )
            rows[name] = part.reshape(len(part), -1)
            if not np.isfinite(rows[name]).all():
                raise ExperimentError(f"environment: its {name!r} is {part.tolist()}, expected finite numbers.")
        return Streams(np.concatenate([rows[name] for name in self.observation_names], 1), rows["context"])

    def scaled(self, actions: np.ndarray, env: "VectorEnv") -> np.ndarray:
        """Actions as the environment takes them.

        Args:
            actions: (N, A), of which what is beyond ± 1 is cut off; or (N,) from 0 where they are discrete.
        """
        if self.is_discrete:
            return self.low + actions
        within = self.low + (np.clip(actions, -1, 1) + 1) / 2 * (self.high - self.low)
        space = env.single_action_space
        return within.astype(space.dtype).reshape(len(actions), *space.shape)  # type: ignore[arg-type]


def checked_rewards(rewards: Any) -> np.ndarray:
    """The rewards (N,). Raises ExperimentError where one is no finite number."""
    rewards = np.asarray(rewards, np.float32)
    if not np.isfinite(rewards).all():
        raise ExperimentError(f"environment: it gave the reward {rewards.tolist()}, expected finite numbers.")
    return rewards


@contextmanager
def playing() -> Iterator[None]:
    """Makes an ExperimentError of what gymnasium says within of an observation that does not fit its space."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise ExperimentError(
            f"environment: what it gave does not fit its observation space: {type(error).__name__}: {error}."
        ) from error


@contextmanager
def needing_gymnasium() -> Iterator[None]:
    """Makes an ExperimentError of gymnasium's lack within, or of minigrid's."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("gymnasium", "minigrid"):
            raise
        raise ExperimentError(f"environments are {error.name}'s: {INSTALL}") from error


def _shown(space: Any) -> str:
    text = str(space)
    return text if len(text) < 100 else type(space).__name__
