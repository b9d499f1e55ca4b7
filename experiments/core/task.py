"""What a task and its data are: the frame trains, evaluates, saves and reports any of them, and knows none."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from experiments.core.errors import ExperimentError, building
from experiments.core.network_size import refuse_beyond_memory

if TYPE_CHECKING:
    from lightning import Trainer
    from matplotlib.figure import Figure

Stage = Literal["train", "val", "test"]


class Monitor(NamedTuple):
    """The metric that says which checkpoint is best."""

    name: str  # one of those that `metrics` gives
    mode: Literal["min", "max"]


class Mean(NamedTuple):
    """A mean and what it is over: symbols, examples, episodes. A batch of nothing has the weight 0."""

    value: Tensor  # ()
    weight: int


class Example(NamedTuple):
    """A call of a network, and what its tensors are called.

    Of the tensors in the arguments, in order, `inputs` has the names, each with the axes whose size is free; `outputs`
    has the names of the tensors in the result.
    """

    arguments: tuple[Any, ...]  # tensors, or tuples of them such as a state
    inputs: dict[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    count: int  # of what the task counts, in this call

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """The sizes of each input, free ones by their names."""
        tensors = pytree.tree_leaves(self.arguments)
        return {
            name: tuple(axes.get(i, size) for i, size in enumerate(tensor.shape))
            for (name, axes), tensor in zip(self.inputs.items(), tensors, strict=True)
        }


class Data(ABC):
    """Batches to train on, to validate with and to test with.

    One without a test gives no `test_dataloader`. A loader that has `state_dict` and `load_state_dict` is asked for its
    place by every checkpoint, so that a run goes on within an epoch.
    """

    trainer: "Trainer | None" = None  # who trains on them; it knows the epoch, and how many processes there are

    def prepare_data(self) -> None:  # noqa: B027
        """Download, in one process of several."""

    def setup(self, stage: str | None = None) -> None:  # noqa: B027
        """Read, in every process. It may be called more than once."""

    @abstractmethod
    def train_dataloader(self) -> Iterable[Any]:
        """The batches of an epoch."""

    @abstractmethod
    def val_dataloader(self) -> Iterable[Any]:
        """The batches of a validation."""

    def _processes(self) -> tuple[int, int]:
        """This process's rank, and how many train together."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _position(self) -> tuple[int, int]:
        """The epoch under way and its first batch to give: Lightning's counts, right once that epoch has begun."""
        assert self.trainer is not None
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready


class Task(ABC):
    """A network, what it learns from a batch, and the metrics that say how well.

    A task states `monitor`, `describe`, `build` and `measure`, and where it has more to say `metrics` and `show`. Its
    data are of a subclass of `Data`. One without data, as a policy that plays episodes, gives `train_dataloader` (its
    rollouts) and `val_dataloader` (its evaluations) itself, and its config has no `data`.

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
    examples: int | None = None  # how many of the test `show` prints and draws; None where it shows none

    def __init__(
        self,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        halve_after: int | None = None,
        average_after: int | None = None,
    ) -> None:
        for name, after in {"halve_after": halve_after, "average_after": average_after}.items():
            if after is not None and after < 1:
                raise ExperimentError(f"{name} is {after}, expected at least 1, or null.")
        self.halve_after, self.average_after = halve_after, average_after
        self.network: nn.Module | None = None
        self.description: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}  # that it was built from, for checkpoints; none if built in Python
        self.is_trial = False  # whether an evaluation is the trial before the training, whose metrics nobody sees
        self._build_optimizer = optimizer

    @abstractmethod
    def describe(self, data: Data | None) -> dict[str, Any]:
        """What the network must know of the data, which are set up, as plain values: a checkpoint holds them."""

    def imagined(self, data: Data | None, sizes: Mapping[str, int]) -> dict[str, Any]:
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

    def pictures(self, data: Data | None) -> "Mapping[str, Figure]":
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

    def restore(self, saved: dict[str, Any]) -> None:  # noqa: B027
        """Take up what `saved` gave."""

    @property
    def monitored(self) -> str:
        """The name under which the monitored metric of the validation is logged."""
        return f"val/{self.monitor.name}"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        tensors = [] if self.network is None else [*self.network.parameters(), *self.network.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def optimizer(self) -> Optimizer:
        """The optimizer of the network's parameters, which must be there. Raises ExperimentError for its settings."""
        assert self.network is not None
        with building(f"{type(self).__name__}: the optimizer"):
            return self._build_optimizer(self.network.parameters())

    def use(self, description: dict[str, Any], whose: str) -> None:
        """Build the network for the data of a description, or raise ExperimentError where it is there for others'."""
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

    def checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds of the task beside the weights, as plain values. Called in every process."""
        of_task = {"name": type(self).__name__, "description": self.description, "saved": self.saved()}
        return {"task": of_task, "hyper_parameters": self.settings} if self.settings else {"task": of_task}

    def take_up(self, checkpoint: dict[str, Any], is_to_train: bool) -> None:
        """Build the network that a checkpoint is of, whose weights are to be loaded, and restore what was saved.

        Raises ExperimentError for a checkpoint of another task, of other data, or of other settings; to evaluate,
        settings may differ that change no weight.
        """
        of_task = checkpoint.get("task", {})
        if of_task.get("name") != type(self).__name__:
            of = f"of the task {of_task['name']}" if "name" in of_task else "of no task"
            raise ExperimentError(f"{type(self).__name__}: the checkpoint is {of}. Give one that this task wrote.")
        self.use(of_task["description"], "the checkpoint's")
        self._refuse_other_settings(checkpoint, is_to_train)
        self.restore(of_task["saved"])

    def _refuse_other_settings(self, checkpoint: dict[str, Any], is_to_train: bool) -> None:
        # Training goes on with the checkpoint's optimiser state, learning rate included: other settings would silently
        # have no effect. Evaluation needs the same parameters only.
        assert self.network is not None
        saved = {name: value for name, value in checkpoint.get("hyper_parameters", {}).items() if name[0] != "_"}
        asked = {name: value for name, value in self.settings.items() if name[0] != "_"}
        differences = list(_differences(saved, asked)) if saved and asked else []
        shapes = {f"network.{name}": tuple(value.shape) for name, value in self.network.state_dict().items()}
        saved_shapes = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if differences and (is_to_train or shapes != saved_shapes):
            raise ExperimentError(
                f"{type(self).__name__}: the checkpoint is of a run with other settings. Give those, or train anew "
                f"without --ckpt_path. They differ in {'; '.join(differences)}."
            )
        if misfits := [name for name in (shapes | saved_shapes) if shapes.get(name) != saved_shapes.get(name)]:
            name = misfits[0]
            raise ExperimentError(
                f"{type(self).__name__}: the checkpoint's weights do not fit the network: {name} is "
                f"{saved_shapes.get(name, 'missing')}, expected {shapes.get(name, 'no such weight')}. "
                "Give the checkpoint of a network that was built from the same settings."
            )


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank: a list of this one alone where there is one."""
    if not _are_several():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def summed(value: Tensor) -> Tensor:
    """The sum of all processes' values, without a gradient."""
    value = value.detach().clone()  # the exchange writes into it
    if _are_several():
        torch.distributed.all_reduce(value)
    return value


def averaged(value: Tensor) -> Tensor:
    """The mean of all processes' values, without a gradient."""
    return summed(value) / (torch.distributed.get_world_size() if _are_several() else 1)


def rank() -> int:
    """This process's number among those that train together, from 0."""
    return torch.distributed.get_rank() if _are_several() else 0


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _differences(saved: Any, asked: Any, path: str = "model") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        for key in sorted(saved.keys() | asked.keys()):
            yield from _differences(saved.get(key), asked.get(key), f"{path}.{key}")
    elif saved != asked:
        yield f"{path} (saved {saved!r}, asked {asked!r})"
