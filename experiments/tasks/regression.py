"""Regression: imitate what two streams make together."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from experiments.core.task import Mean, Monitor, Stage
from experiments.data.synthetic import Pairs
from experiments.tasks.synthetic_task import SyntheticTask
from multint import Integrator


class Regression(SyntheticTask):
    """Least squares: minimises the mean of (f(x, z) − y)² over examples and outputs.

    Logged are that loss and `nmse`, the loss divided by the mean of y²: 1 for a network that predicts 0.

    Args:
        network: factory `(X, Z, O) -> Integrator` of f: a `Bilinear`, a whole `Conditional`, or any other.
        optimizer, halve_after: see `Task`.
    """

    monitor = Monitor("nmse", "min")

    sizes_key, expected = "features", "pairs of streams, as Teacher or AffineTasks"

    def __init__(self, network: Callable[[int, int, int], Integrator], **settings: Any) -> None:
        super().__init__(network, **settings)

    def sizes_of(self, description: dict[str, Any]) -> tuple[int, ...]:
        return tuple(description["features"])

    def measure(self, batch: Pairs, stage: Stage) -> dict[str, Mean]:
        assert self.network is not None
        loss = nn.functional.mse_loss(self.network(batch.x, batch.z), batch.y)
        return {"loss": Mean(loss, len(batch.y)), "power": Mean(batch.y.square().mean(), len(batch.y))}

    def metrics(self, means: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        return {"loss": means["loss"], "nmse": means["loss"] / means["power"]}
