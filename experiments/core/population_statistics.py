"""The statistics that batch normalisation evaluates with, estimated by a pass over training data."""

from itertools import islice
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from experiments.core.errors import ExperimentError
from experiments.core.task import summed
from multint import MultintError
from multint.integrators import RecurrentBatchNorm, population_statistics


class PopulationStatistics(Callback):
    """Estimates those of the network's `RecurrentBatchNorm`s anew before each validation, for the weights as they are.

    So the best checkpoint has the statistics that it was validated with. The pass is over the training batches that
    come next, which changes nothing in the training. Several processes share it.

    Args:
        batches: how many batches the pass has at most; it ends with the epoch.

    Raises: ExperimentError for a number below 1, and for a network without such norms.
    """

    def __init__(self, batches: int = 100) -> None:
        if batches < 1:
            raise ExperimentError(f"PopulationStatistics: batches is {batches}, expected at least 1.")
        self.batches = batches

    # At its first batch, since averages of the weights take the weights' place when the validation starts.
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or batch_idx or dataloader_idx:
            return
        task, precision = pl_module.task, trainer.precision_plugin
        source = task if trainer.datamodule is None else trainer.datamodule.data
        carried = task.saved()
        try:
            with torch.random.fork_rng(), precision.forward_context(), population_statistics(task.network):
                for some in islice(source.train_dataloader(), self.batches):
                    task.measure(trainer.strategy.batch_to_device(some), "train")
        except MultintError as error:
            raise ExperimentError(f"PopulationStatistics: {error}.") from error
        task.restore(carried)
        for norm in task.network.modules():
            if isinstance(norm, RecurrentBatchNorm):
                _pool(norm)


@torch.no_grad()
def _pool(norm: RecurrentBatchNorm) -> None:
    """Give every process the statistics of the rows of all."""
    count = summed(norm.count)
    share = (norm.count / count.clamp(min=1)).unsqueeze(1)
    mean = summed(share * norm.mean)
    variance = summed(share * (norm.variance + (norm.mean - mean).square()))
    seen = (count > 0).unsqueeze(1)
    norm.mean.copy_(torch.where(seen, mean, norm.mean))
    norm.variance.copy_(torch.where(seen, variance, norm.variance))
    norm.count.copy_(count)
