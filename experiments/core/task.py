"""What a task is: the frame trains, evaluates, saves and reports any of them, and knows none."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.core.averaging import AverageWeights
from experiments.core.errors import ExperimentError, building
from experiments.core.means import Mean, StreamMeans
from experiments.core.memory import refuse_beyond_memory
from experiments.core.processes import averaged
from experiments.core.programs import Example
from experiments.core.schedule import HalveLearningRate
from experiments.core.settings import refuse_other_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stage = Literal["train", "val", "test"]


class Monitor(NamedTuple):
    """The metric that says which checkpoint is best."""

    name: str  # one of those that `metrics` gives
    mode: Literal["min", "max"]


class Task(LightningModule, ABC):
    """A network, what it learns from a batch, and the metrics that say how well.

    A task states `monitor`, `describe`, `build` and `measure`, and where it has more to say `metrics` and `show`. Its
    data come from a LightningDataModule. One without such data, as a policy that plays episodes, gives Lightning's
    `train_dataloader` (its rollouts) and `val_dataloader` (its evaluations) itself, and its config has no `data`.

    The metrics are logged as `train/NAME`, `val/NAME` and `test/NAME`: in training those of a batch, in evaluation
    those of all that was seen, exactly, in all processes together.

    Args:
        optimizer: factory `(parameters) -> Optimizer`.
        halve_after: halve the learning rate after that many validations without a gain.
        average_after: begin the mean of the weights at the first validation that is worse than the best of all but
            so many before it; for the optimizer `ASGD`. See `AverageWeights`.

    Raises: ExperimentError for settings out of range, for a network that cannot be built or would not fit into the
    machine's memory, and for a checkpoint of another task, of other settings or of other data.
    """

    monitor: Monitor  # of the class, or set before Task's own __init__
    unit: ClassVar[str] = "examples"  # what the weight of the loss counts

    def __init__(
        self,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        halve_after: int | None = None,
        average_after: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if "_instantiator" not in self.hparams:
            # Built in Python, not from a config: the factories are code, and a checkpoint holds values only.
            self.hparams.clear()
        self.network: nn.Module | None = None
        self.description: dict[str, Any] = {}
        self._build_optimizer = optimizer
        self._schedules: list[Callback] = []
        if halve_after is not None:
            self._schedules.append(HalveLearningRate(halve_after, self.monitored, self.monitor.mode))
        if average_after is not None:
            self._schedules.append(AverageWeights(average_after, self.monitored, self.monitor.mode))
        self._means = StreamMeans()  # of the evaluation under way

    @abstractmethod
    def describe(self, data: LightningDataModule | None) -> dict[str, Any]:
        """What the network must know of the data, which are set up, as plain values: a checkpoint holds them."""

    def imagined(self, data: LightningDataModule | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The description from the data's settings and the sizes given alone, as if the data were there, for `summary`.

        Raises ExperimentError where that does not say enough, or the task does not know how.
        """
        raise ExperimentError(f"{type(self).__name__}: this task cannot build its network without data.")

    @abstractmethod
    def build(self, description: dict[str, Any]) -> nn.Module:
        """The network for the data of this description."""

    @abstractmethod
    def measure(self, batch: Any, stage: Stage) -> dict[str, Mean]:
        """The means over a batch, by name: in training `loss`, which is minimised, and any others.

        A mean called `penalty` is minimised beside the loss.
        """

    def metrics(self, means: Mapping[str, Tensor], stage: Stage) -> Mapping[str, Tensor]:
        """What is logged of the means, by name: of a batch in training, of all that was seen in evaluation."""
        return means

    def last_loss(self, network: nn.Module, batch: Any, steps: int) -> Tensor:
        """The loss at the last of so many steps, () and summed over the sequences of a batch, for analyses.

        The network, one that `build` gave, starts from its initial state. Raises ExperimentError for a batch that is
        shorter, and for a task that does not say how.
        """
        raise ExperimentError(f"{type(self).__name__}: this task does not say what the loss at one step is.")

    def show(self) -> str:
        """What is printed of the best checkpoint when a run has ended: a sample of text, for example."""
        return ""

    def pictures(self, data: LightningDataModule | None) -> "Mapping[str, Figure]":
        """What the command `show` draws for data that are set up, by name."""
        return {}

    def sizes(self) -> dict[str, Any]:
        """Those of the network's settings that the data decided: with them `export` tells how it is rebuilt."""
        return {}

    def example(self) -> Example:
        """A call of the network, for `export` to trace. Raises ExperimentError for a task that knows none."""
        raise ExperimentError(f"{type(self).__name__}: this task does not say how its network is called.")

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds beside the parameters, as plain values. Called in every process."""
        return {}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up what `saved` gave."""

    @property
    def monitored(self) -> str:
        """The name under which the monitored metric of the validation is logged."""
        return f"val/{self.monitor.name}"

    def setup(self, stage: str) -> None:
        """Build the network for the data, if it is not there yet."""
        self._use(self.describe(self.trainer.datamodule), "the data given")

    def configure_optimizers(self) -> Optimizer:
        with building(f"{type(self).__name__}: the optimizer"):
            return self._build_optimizer(self.parameters())

    def configure_callbacks(self) -> list[Callback]:
        return self._schedules

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        means = self.measure(batch, "train")
        if "loss" not in means:
            raise ExperimentError(
                f"{type(self).__name__}: measure gives {', '.join(means)}, expected a loss in training."
            )
        # A metric of the processes' mean loss, which is not the mean of their metrics.
        reduced = {name: averaged(mean.value) for name, mean in means.items()}
        self._log("train", self.metrics(reduced, "train"))
        objective = means["loss"].value
        if "penalty" in means:
            objective = objective + means["penalty"].value
        return {"loss": objective, "weight": means["loss"].weight}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._means.update(self.measure(batch, "val"))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._means.update(self.measure(batch, "test"))

    def on_validation_epoch_end(self) -> None:
        self._log("val", self.metrics(self._means.compute(), "val"))

    def on_test_epoch_end(self) -> None:
        self._log("test", self.metrics(self._means.compute(), "test"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = {
            "name": type(self).__name__,
            "description": self.description,
            "saved": self.saved(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        task = checkpoint.get("task", {})
        if task.get("name") != type(self).__name__:
            of = f"of the task {task['name']}" if "name" in task else "of no task"
            raise ExperimentError(f"{type(self).__name__}: the checkpoint is {of}. Give one that this task wrote.")
        self._use(task["description"], "the checkpoint's")
        refuse_other_settings(self, checkpoint)
        self.restore(task["saved"])

    def _use(self, description: dict[str, Any], whose: str) -> None:
        if self.network is None:
            with building(f"{type(self).__name__}: the network"):
                refuse_beyond_memory(lambda: self.build(description))
                self.network, self.description = self.build(description), description
        elif description != self.description:
            names = ", ".join(sorted(k for k in description if description[k] != self.description.get(k)))
            raise ExperimentError(
                f"{type(self).__name__}: the checkpoint is of other data: {whose} differ in the {names}. "
                "Give the data that the checkpoint was trained on."
            )

    def _log(self, stage: Stage, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            shown = name == self.monitor.name or (stage == "train" and name == "loss")
            # Every process has the same value already; Lightning warns unless told to average.
            self.log(f"{stage}/{name}", value, prog_bar=shown, sync_dist=stage != "train")


class NetworkFirst(Callback):
    """Builds the task's network before the callbacks after this one are set up: some copy it, or look into it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.setup(stage)
