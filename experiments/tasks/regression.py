"""Regression: imitate what two streams make together."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning import LightningDataModule
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from experiments.core.errors import ExperimentError
from experiments.core.means import Mean
from experiments.core.task import Monitor, Stage, Task
from experiments.data.synthetic import DrawnData, Pairs
from multint import Integrator


class Regression(Task):
    """Least squares: minimises the mean of (f(x, z) − y)² over examples and outputs.

    Logged are that loss and `nmse`, the loss divided by the mean of y²: 1 for a network that predicts 0.

    Args:
        network: factory `(X, Z, O) -> Integrator` of f: a `Bilinear`, a whole `Conditional`, or any other.
        optimizer, halve_after: see `Task`.
    """

    monitor = Monitor("nmse", "min")

    def __init__(
        self,
        network: Callable[[int, int, int], Integrator],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
    ) -> None:
        super().__init__(optimizer, halve_after)
        self._build_network = network

    def describe(self, data: LightningDataModule | None) -> dict[str, Any]:
        learnt = data.learnt() if isinstance(data, DrawnData) else {}
        if "features" not in learnt:
            raise ExperimentError(
                f"Regression: the data are {type(data).__name__}, expected pairs of streams, as Teacher or AffineTasks."
            )
        return learnt

    def imagined(self, data: LightningDataModule | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        return self.describe(data)

    def build(self, description: dict[str, Any]) -> Integrator:
        return self._build_network(*description["features"])

    def measure(self, batch: Pairs, stage: Stage) -> dict[str, Mean]:
        assert self.network is not None
        loss = nn.functional.mse_loss(self.network(batch.x, batch.z), batch.y)
        return {"loss": Mean(loss, len(batch.y)), "power": Mean(batch.y.square().mean(), len(batch.y))}

    def metrics(self, means: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        return {"loss": means["loss"], "nmse": means["loss"] / means["power"]}
