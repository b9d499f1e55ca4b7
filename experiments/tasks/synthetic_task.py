"""What tasks on synthetic data share: their network is built for what the data tell of themselves."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from experiments.core.errors import ExperimentError
from experiments.core.task import Data, Task
from experiments.data.synthetic import SyntheticData


class SyntheticTask(Task):
    """A task on `SyntheticData`, of which `learnt` tells the sizes. A subclass says the `sizes_of` its network.

    Args:
        network: factory of the network, called with these sizes.
        optimizer, halve_after: see `Task`.
    """

    sizes_key: ClassVar[str]  # what the data must tell of themselves
    expected: ClassVar[str]  # the data that do, for messages

    def __init__(
        self,
        network: Callable[..., nn.Module],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
    ) -> None:
        super().__init__(optimizer, halve_after)
        self._build_network = network

    @abstractmethod
    def sizes_of(self, description: dict[str, Any]) -> tuple[int, ...]:
        """The sizes that the network is built with."""

    def describe(self, data: Data | None) -> dict[str, Any]:
        learnt = data.learnt() if isinstance(data, SyntheticData) else {}
        if self.sizes_key not in learnt:
            raise ExperimentError(
                f"{type(self).__name__}: the data are {type(data).__name__}, expected {self.expected}."
            )
        return learnt

    def imagined(self, data: Data | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        return self.describe(data)

    def build(self, description: dict[str, Any]) -> nn.Module:
        return self._build_network(*self.sizes_of(description))
