"""What tasks share whose policy plays its environment, in training and in evaluation."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.core.errors import ExperimentError
from experiments.core.task import Data, Mean, Monitor, Stage, Task, gathered
from experiments.data.batch_streams import generator_of
from experiments.environments import Environment, Simulation, Spaces
from experiments.environments.evaluation import SEEDS, Played
from experiments.tasks.policy_pictures import draw_episode, draw_film, draw_returns
from multint import Integrator

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PolicyTask(Task):
    """A policy that learns from what it plays, and is evaluated in the episodes that its environment has for that.

    A subclass gives `play`, `scores` and `losses`, and the batches that are played, with `seed`.
    """

    monitor = Monitor("return", "max")
    unit = "steps"
    takes_discrete: ClassVar[bool]  # whether the actions may be of the space `Discrete`

    def __init__(
        self,
        environment: Environment,
        network: Callable[[int, int, int], Integrator],
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        halve_after: int | None,
    ) -> None:
        super().__init__(optimizer, halve_after)
        self.environment = environment
        self._build_network = network

    @abstractmethod
    def play(self, stage: Literal["val", "test"], is_drawn: bool = False) -> Played:
        """The episodes of an evaluation, by drawn actions or by the policy's likeliest ones."""

    @abstractmethod
    def scores(self, played: Played) -> dict[str, np.ndarray]:  # (N,) each
        """The metrics of each episode of an evaluation."""

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Mean]:
        """What `measure` gives of a batch of the training."""

    def describe(self, data: Data | None) -> dict[str, Any]:
        if data is not None:
            raise ExperimentError(
                f"{type(self).__name__}: the data are {type(data).__name__}, expected none: it plays its environment."
            )
        env = self.environment.training(1)
        spaces = Spaces.of(env, self.takes_discrete)
        env.close()
        return {"features": list(spaces.features)} | (
            {"is_discrete": spaces.is_discrete} if self.takes_discrete else {}
        )

    def imagined(self, data: Data | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        return self.describe(data)

    def seed(self, purpose: str) -> int:
        """Of what the training plays. Raises ExperimentError where several processes train."""
        if len(gathered(None)) > 1:
            raise ExperimentError(
                f"{type(self).__name__}: several processes train, expected one. Give --trainer.devices=1"
            )
        return generator_of(0, purpose, torch.initial_seed()).initial_seed()

    def val_dataloader(self) -> list[Literal["val"]]:
        return ["val"]

    def test_dataloader(self) -> list[Literal["test"]]:
        return ["test"]

    def measure(self, batch: Any, stage: Stage) -> dict[str, Mean]:
        if stage == "train":
            return self.losses(batch)
        return {
            f"{name}{suffix}": Mean(torch.tensor(of_episodes.mean()), len(of_episodes))
            for suffix, is_drawn in {"": False, "_sampled": True}.items()
            for name, of_episodes in self.scores(self.play(stage, is_drawn)).items()
        }

    def pictures(self, data: Data | None) -> "Mapping[str, Figure]":
        """The validation's first episode, and the returns over the test's contexts where the episode is no film."""
        played = self.play("val")
        if (film := self.environment.film("val", SEEDS["val"], played.actions[played.are_part[:, 0], 0])) is not None:
            return {"episode": draw_film(film, played.returns[0])}
        over = self.play("test")
        if isinstance(self.environment, Simulation):  # which may hide the contexts from the agent
            over = over._replace(contexts=self.environment.contexts("test"))
        return {"returns": draw_returns(over), "episode": draw_episode(played)}
