"""What the data of all neural processes share: functions, and tasks of their points."""

import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.core.task import Data
from experiments.data.batch_streams import Draw, FixedBatches, TrainingBatches
from experiments.data.functions import gaussian_process
from experiments.data.functions.batches import Batch, Sizes, shared_out
from experiments.data.functions.function_sets import Functions, Predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FunctionData(Data):
    """Tasks of functions: from a context of a function's points its values at targets are to be predicted.

    A subclass gives `_functions`, the sets of each split. In training the tasks are new ones at every step, drawn from
    the seed: a run that goes on has those of an uninterrupted one. In evaluation they are always the same.

    Raises ExperimentError at construction for a setting out of range.
    """

    def __init__(
        self,
        batch_size: int,
        sizes: Sizes,
        eval_sizes: Sizes,
        ragged: bool,
        epoch: int,
        valid_tasks: int,
        test_tasks: int,
        eval_batch_size: int,
        seed: int | None,
        eval_seed: int,
    ) -> None:
        numbers = {
            "batch_size": batch_size,
            "epoch": epoch,
            "valid_tasks": valid_tasks,
            "test_tasks": test_tasks,
            "eval_batch_size": eval_batch_size,
        }
        for name, number in numbers.items():
            if number < 1:
                raise ExperimentError(f"--data.{name}: got {number}, expected at least 1.")
        sizes.check("")
        eval_sizes.check("eval_")
        self.batch_size, self.eval_batch_size, self.epoch = batch_size, eval_batch_size, epoch
        self.tasks = {"valid": valid_tasks, "test": test_tasks}
        self.sizes, self.eval_sizes, self.ragged = sizes, eval_sizes, ragged
        self.seed, self.eval_seed = seed, eval_seed
        self._sets: dict[str, Mapping[str, Functions]] = {}  # by split

    @abstractmethod
    def _functions(self) -> dict[str, Mapping[str, Functions]]:
        """The sets by name of "train" (one), "valid" and "test". Raises ExperimentError where they cannot be used."""

    @abstractmethod
    def pictures(self, predict: Predict) -> "dict[str, Figure]":
        """Pictures of predictions for the test's functions, by name, after `setup`."""

    @property
    @abstractmethod
    def features(self) -> tuple[int, int]:
        """The sizes X and Y of a point, which the settings tell without the data."""

    def setup(self, stage: str | None = None) -> None:
        """Makes or reads the functions, once for all stages. Raises ExperimentError where they cannot be used."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**32  # the run's, by which its parameters are drawn too
        processes = self._processes()[1]
        if self.batch_size % processes:
            raise ExperimentError(
                f"--data.batch_size: got {self.batch_size} tasks for {processes} processes, expected a multiple of "
                f"{processes}, so that each has as many."
            )
        if not self._sets:
            self._sets = self._functions()

    def train_dataloader(self) -> TrainingBatches:
        """Batches of new tasks, resumable within an epoch."""
        [(name, functions)] = self._sets["train"].items()

        def draw(index: int, generator: torch.Generator) -> Batch:
            chosen = torch.arange(self.batch_size)
            if functions.count is not None:
                chosen = torch.randint(functions.count, (self.batch_size,), generator=generator)
            return _drawn(functions, chosen, self.sizes, self.ragged, generator, name, index)

        assert self.seed is not None
        position = None if self.trainer is None else self._position
        return TrainingBatches(draw, self.epoch, self.seed, position, *self._processes())

    def val_dataloader(self) -> FixedBatches:
        """The validation's tasks."""
        return self._fixed("valid")

    def test_dataloader(self) -> FixedBatches:
        """The test's tasks, with the ceiling where that is known."""
        return self._fixed("test")

    def _fixed(self, split: str) -> FixedBatches:
        draws, counts = {}, {}
        for name, functions in self._sets[split].items():
            tasks = min(self.tasks[split], functions.count or sys.maxsize)
            counts[name] = -(-tasks // self.eval_batch_size)
            draws[name] = self._evaluated(functions, tasks, name)
        return FixedBatches(draws, counts, (split, self.eval_seed), *self._processes())

    def _evaluated(self, functions: Functions, tasks: int, name: str) -> Draw:
        def draw(index: int, generator: torch.Generator) -> Batch:
            chosen = torch.arange(tasks)[index * self.eval_batch_size : (index + 1) * self.eval_batch_size]
            return _drawn(functions, chosen, self.eval_sizes, self.ragged, generator, name, index, with_ceiling=True)

        return draw


def _drawn(
    functions: Functions,
    chosen: Tensor,  # (B,)
    sizes: Sizes,
    is_ragged: bool,
    generator: torch.Generator,
    name: str,
    index: int,
    with_ceiling: bool = False,
) -> Batch:
    """One task of each of the chosen functions."""
    contexts, targets = sizes.draw(functions.available(chosen), generator, is_ragged)
    x, y, covariance = functions.observe(chosen, int((contexts + targets).max()), generator)
    batch = shared_out(x, y, contexts, targets, name, index)._replace(has_own_sizes=is_ragged)
    if not with_ceiling or covariance is None:
        return batch
    return batch._replace(ceiling=gaussian_process.log_likelihood(covariance, y[..., 0], contexts, targets))
