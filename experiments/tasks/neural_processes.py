"""Neural processes: predict a function's values from some of its points."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from experiments.core.errors import ExperimentError
from experiments.core.task import Data, Mean, Monitor, Stage, Task, gathered
from experiments.data.functions import Batch, FunctionData
from experiments.tasks.task_scores import Scores, TaskScores, table
from models import NeuralProcess, Points, elbo, importance_weighted, log_likelihood
from models.neural_process import joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NeuralProcesses(Task):
    """Maximises the log-likelihood of a function's values at targets, given a context of its points.

    Without a latent path the objective is the targets' log-likelihood itself. With one it is a bound of it: by draws
    from q(z | targets) the ELBO of Garnelo et al. 2018 or the importance-weighted bound, or the `joint` below by draws
    from p(z | context), as in Foong et al. 2020. It is divided by each task's number of targets. In evaluation the
    targets are always held out.

    Logged in evaluation, in nats per target, each task weighing the same:
      log_likelihood      log mean_k p(y_n | z_k) of every target by itself, z_k ~ p(z | context), k = 1 … eval_samples
      joint               log mean_k Π_n p(y_n | z_k) of a task's targets together, with the same draws
      importance          the same by as many draws from q(z | context and targets), weighted
      elbo                of context and targets, by one draw of these
      marginal_ceiling    `log_likelihood` of the exact Gaussian process, where the data are of one
      joint_ceiling       and `joint` of it
    The second to the fourth are there with a latent path only, the last four in the test only.
    A name with `_half_width` is that of the 95 % t-interval over tasks. In the test the names begin with that of the
    set; the best checkpoint's report shows them by context size too. With a latent path they depend, by the draws, on
    the number of processes.

    The smallest predictive deviation, the network's `floor`, caps all of these at −log(floor·√(2π)) for each of the Y
    values of a point.

    Args:
        network: factory `(X, Y) -> NeuralProcess`; it is called when the sizes of the data's points are known.
        optimizer, halve_after: see `Task`.
        predict_context: the training's targets include the context's points.
        samples: K, draws of z in training.
        bound: the objective with a latent path. With one draw, `importance` estimates the ELBO's KL by that draw.
        eval_samples: K in evaluation.
        buckets: the context sizes at which the test's report begins a new row.
    """

    monitor = Monitor("log_likelihood", "max")
    unit = "tasks"

    def __init__(
        self,
        network: Callable[[int, int], NeuralProcess],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
        predict_context: bool = True,
        samples: int = 1,
        bound: Literal["elbo", "importance", "joint"] = "elbo",
        eval_samples: int = 50,
        buckets: list[int] | None = None,
    ) -> None:
        super().__init__(optimizer, halve_after)
        for name, number in {"samples": samples, "eval_samples": eval_samples}.items():
            if number < 1:
                raise ExperimentError(f"NeuralProcesses: {name} is {number}, expected at least 1.")
        self.predict_context, self.samples, self.bound = predict_context, samples, bound
        self.eval_samples, self.buckets = eval_samples, buckets or [0, 1, 5, 10, 20, 40]
        self._build_network = network
        self._scores = TaskScores()  # of the evaluation under way
        self._tested: Mapping[str, Scores] = {}

    def imagined(self, data: Data | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        return self.describe(data)

    def describe(self, data: Data | None) -> dict[str, Any]:
        if not isinstance(data, FunctionData):
            raise ExperimentError(
                f"NeuralProcesses: the data are {type(data).__name__}, expected functions, as Curves, Images or Table."
            )
        x_features, y_features = data.features
        return {"x_features": x_features, "y_features": y_features}

    def build(self, description: dict[str, Any]) -> NeuralProcess:
        return self._build_network(description["x_features"], description["y_features"])

    def measure(self, batch: Batch, stage: Stage) -> dict[str, Mean]:
        context = Points(batch.context_x, batch.context_y, batch.context_mask)
        targets = Points(batch.target_x, batch.target_y, batch.target_mask)
        if stage != "train":
            return self._evaluate(batch, context, targets, stage)
        everything = joined(context, targets)
        predicted = everything if self.predict_context else targets
        return {"loss": Mean(-self._objective(context, predicted, everything).mean(), len(targets.x))}

    def metrics(self, means: Mapping[str, Tensor], stage: Stage) -> Mapping[str, Tensor]:
        if stage == "train":
            return means
        scores = self._scores.collected(gathered(self._scores.taken()))
        if stage == "test":
            self._tested = scores
        named = {
            f"{name}/{metric}" if stage == "test" else metric: value
            for name, of_set in scores.items()
            for metric, value in of_set.summary().items()
        }
        return {name: torch.tensor(value, device=self.device) for name, value in named.items()}

    def show(self) -> str:
        if not self._tested:
            return ""
        network = self._network()
        head = ["Nats per held-out target, each by itself; ± 95 % over tasks."]
        if network.floor:
            cap = -network.y_features * math.log(network.floor * math.sqrt(2 * math.pi))
            head.append(f"σ is at least {network.floor:g}, so they are at most {cap:.3f}.")
        if any("joint_ceiling" in scores.values for scores in self._tested.values()):
            head.append("The ceilings are the exact process's: of each target by itself, and of all together (joint).")
        if network.latent is not None:
            head.append(f"By {self.eval_samples} draws of z; joint and importance are of all targets together.")
            head.append("elbo is of context and targets, by one draw.")
        return "\n\n".join(
            ["\n".join(head), *(table(name, scores, self.buckets) for name, scores in self._tested.items())]
        )

    def pictures(self, data: Data | None) -> "Mapping[str, Figure]":
        assert isinstance(data, FunctionData)
        return data.pictures(self.predict)

    @torch.no_grad()
    def predict(
        self,
        context_x: Tensor,  # (B, C, X)
        context_y: Tensor,  # (B, C, Y)
        x: Tensor,  # (B, N, X)
    ) -> tuple[Tensor, Tensor]:  # (K, B, N, Y) each
        """Means and deviations at x, for `eval_samples` draws of z; K = 1 where there is no latent path."""
        network, context = self._network(), Points(context_x, context_y)
        if network.latent is None:
            mean, std = network(context, x)
            return mean.unsqueeze(0), std.unsqueeze(0)
        mean, std = network(
            context, x, network.prior(context).sample(self.eval_samples, torch.Generator().manual_seed(0))
        )
        return mean, std

    def _network(self) -> NeuralProcess:
        assert isinstance(self.network, NeuralProcess)
        return self.network

    def _objective(self, context: Points, predicted: Points, everything: Points) -> Tensor:  # (B,)
        network = self._network()
        if network.latent is None:
            return log_likelihood(network, context, predicted).marginal
        if self.bound == "joint":
            return log_likelihood(network, context, predicted, self.samples).joint
        if self.bound == "elbo":
            return elbo(network, context, predicted, everything, self.samples)
        return importance_weighted(network, context, predicted, everything, self.samples)

    def _evaluate(self, batch: Batch, context: Points, targets: Points, stage: Stage) -> dict[str, Mean]:
        count = len(targets.x)
        if count == 0:  # other processes have the tasks
            return {"loss": Mean(torch.zeros((), device=self.device), 0)}
        network, draws = self._network(), self.eval_samples
        # Its own, so that the same checkpoint has the same score in validation, in test, and after any training.
        generator = torch.Generator(self.device).manual_seed(batch.index)
        scores = log_likelihood(network, context, targets, draws, generator)
        values = {"log_likelihood": scores.marginal}
        if network.latent is not None:
            values["joint"] = scores.joint
        if network.latent is not None and stage == "test":
            everything = joined(context, targets)
            values["importance"] = importance_weighted(network, context, targets, everything, draws, generator)
            values["elbo"] = elbo(network, context, everything, everything, 1, generator)
        if batch.ceiling is not None and stage == "test":
            values |= {"marginal_ceiling": batch.ceiling.marginal, "joint_ceiling": batch.ceiling.joint}
        self._scores.take(batch.name, None if batch.has_own_sizes else batch.index, context.counts, values)
        return {"loss": Mean(-scores.marginal.mean(), count)}
