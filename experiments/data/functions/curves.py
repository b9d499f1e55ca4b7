"""Curves drawn from Gaussian processes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.core.errors import ExperimentError
from experiments.data.functions.batches import Sizes
from experiments.data.functions.function_data import FunctionData
from experiments.data.functions.function_sets import Functions, GaussianProcess, Predict
from experiments.data.functions.kernels import RBF, Kernel, Range
from experiments.data.functions.pictures import curves as draw_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Interval = tuple[int, int]  # these included


class Curves(FunctionData):
    """Curves from Gaussian processes, with the exact process's log-likelihood beside every test.

    The defaults are those of the protocol of Lee et al. 2020 (Bootstrapping Neural Processes), which later papers copy.

    Raises ExperimentError at construction for a setting out of range.

    Args:
        kernel: of the training's and the validation's curves.
        test_kernels: of the test's, a set for each, called by its kind, each kind once; None: the training's.
        noise: standard deviation of the observations' noise.
        x_range: where the inputs lie.
        context: how many context points a task has, from the first to the second number.
        targets: the same of its target points.
        most: their largest sum; the targets are fewer where it says so. None: no bound.
        eval_context: `context` in validation and test; None: the same.
        eval_targets: `targets` there.
        eval_most: `most` there; None: the same if the two before are, else no bound.
        ragged: sizes drawn for each task; else for each batch, as published.
        batch_size: tasks in a step, shared out among the processes where there are several.
        epoch: steps in an epoch; there is no end of curves.
        valid_tasks: tasks of the validation.
        test_tasks: tasks of each test set.
        eval_batch_size: tasks in a batch of these. It changes their sizes, unless they are ragged.
        seed: of the training's tasks; None: the run's, seed_everything.
        eval_seed: of the validation's and the test's.
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        test_kernels: list[Kernel] | None = None,
        noise: float = 0.02,
        x_range: Range = (-2.0, 2.0),
        context: Interval = (3, 46),
        targets: Interval = (3, 46),
        most: int | None = 49,
        eval_context: Interval | None = None,
        eval_targets: Interval | None = None,
        eval_most: int | None = None,
        ragged: bool = False,
        batch_size: int = 16,
        epoch: int = 1000,
        valid_tasks: int = 1024,
        test_tasks: int = 48_000,
        eval_batch_size: int = 16,
        seed: int | None = None,
        eval_seed: int = 0,
    ) -> None:
        eval_most = most if eval_most is None and eval_context is None and eval_targets is None else eval_most
        eval_sizes = Sizes(eval_context or context, eval_targets or targets, eval_most)
        shared = (ragged, epoch, valid_tasks, test_tasks, eval_batch_size, seed, eval_seed)
        super().__init__(batch_size, Sizes(context, targets, most), eval_sizes, *shared)
        if not noise >= 0:
            raise ExperimentError(f"--data.noise: got {noise}, expected at least 0.")
        if not x_range[0] < x_range[1]:
            raise ExperimentError(
                f"--data.x_range: got {x_range[0]} to {x_range[1]}, expected a lower and a higher one."
            )
        self.kernel, self.noise, self.x_range = kernel or RBF(), noise, x_range
        self.test_kernels = test_kernels or [self.kernel]
        names = [of_test.name for of_test in self.test_kernels]
        if len(set(names)) < len(names):
            raise ExperimentError(
                f"--data.test_kernels: got {', '.join(names)}, expected each kind once. Give another of the same kind "
                "to a test of its own: test --ckpt_path CKPT --data.test_kernels=[…]."
            )

    @property
    def features(self) -> tuple[int, int]:
        return 1, 1

    def _functions(self) -> dict[str, Mapping[str, Functions]]:
        def curves(kernel: Kernel) -> Mapping[str, Functions]:
            return {kernel.name: GaussianProcess(kernel, self.noise, self.x_range)}

        test = {name: curves_of for kernel in self.test_kernels for name, curves_of in curves(kernel).items()}
        return {"train": curves(self.kernel), "valid": curves(self.kernel), "test": test}

    def pictures(self, predict: Predict) -> "dict[str, Figure]":
        sets = {
            name: functions for name, functions in self._sets["test"].items() if isinstance(functions, GaussianProcess)
        }
        return {"predictions": draw_curves(sets, self.eval_sizes, predict, self.eval_seed)}
