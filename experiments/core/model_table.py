"""What a network consists of: its parameters by part."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from torch import nn


class ModelTable(ModelSummary):
    """Prints the parameters of each part before the training.

    It stands in the place of Lightning's table, which has a row for the whole network and tells 0 FLOPs.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module.network, nn.Module):
            print(table(parameter_rows(pl_module.network)), flush=True)


def parameter_rows(network: nn.Module) -> dict[str, str]:
    """The parameters of each part, and in all; one that two parts share is counted with the first."""
    seen: set[int] = set()
    counts: dict[str, int] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part = name.partition(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
    return {name: f"{count:,}" for name, count in counts.items()} | {"in all": f"{sum(counts.values()):,} parameters"}


def table(rows: dict[str, str]) -> str:
    """The rows as text."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
