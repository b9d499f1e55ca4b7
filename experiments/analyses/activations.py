"""How the hidden activations are distributed, and how many are saturated."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from experiments.analyses.recording import named, named_stacks
from experiments.core.errors import ExperimentError
from experiments.core.run_folder import Histogram, write_histograms
from experiments.core.task import gathered


class HiddenActivations(Callback):
    """Logs `val/saturated`, the share of activations with |h| > `saturated`, and writes `activations.csv`.

    That file has the histogram of every validation: of all h_t that a recurrent stack gives, over all validation data,
    which are those of its last layer. The bins divide −1 … 1; the outermost hold what lies beyond, too. What is no
    finite number is not counted. A network of several stacks has values of each, `val/saturated_NAME`.

    Args:
        saturated: from where on an activation counts as saturated: at .9 the slope of tanh is .19. Our own choice, as
            the paper gives none.
        bins: of the histogram, an even number: one of them would hold both signs else.

    Raises: ExperimentError for settings out of range, and for a network without recurrent layers.
    Source: Wu et al. 2016, section 3.1.1 and figure 1 (c) and (d).
    """

    def __init__(self, saturated: float = 0.9, bins: int = 40) -> None:
        if not 0 < saturated < 1 or bins < 2 or bins % 2:
            raise ExperimentError(
                f"HiddenActivations: got saturated={saturated} and bins={bins}, expected a number between 0 and 1, and "
                "an even one."
            )
        self.saturated, self.bins = saturated, bins
        self._counts: dict[str, Tensor] = {}  # of the validation under way: by bin, and last of those saturated
        self._hooks: list[RemovableHandle] = []
        self._histograms: list[Histogram] = []

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking:
            return
        for name, stack in named_stacks(pl_module.task.network):
            # For the batch alone: who copies the network when the validation has ended copies no hook.
            self._hooks.append(stack.register_forward_hook(partial(self._count, name)))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        edges = [2 * i / self.bins - 1 for i in range(self.bins + 1)]
        for name, _ in named_stacks(pl_module.task.network):
            counts = self._counts.get(name, torch.zeros(self.bins + 1, dtype=torch.int64))  # others may have all data
            *bins, saturated = torch.stack(gathered(counts)).sum(0).tolist()
            share = saturated / sum(bins) if sum(bins) else float("nan")
            pl_module.log(named("val/saturated", name), share, sync_dist=True)
            self._histograms.append(Histogram(trainer.global_step, name, edges, bins))
        if trainer.state.fn == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            write_histograms(Path(trainer.default_root_dir) / "activations.csv", self._histograms)
        self._counts = {}

    def _count(self, name: str, stack: nn.Module, arguments: Any, result: tuple[Any, Any]) -> None:
        h = result[0].data if isinstance(result[0], PackedSequence) else result[0]
        h = h[h.isfinite()].float()  # the bins of half precision are no equal ones
        half = self.bins // 2
        bins = ((h * half).floor().clamp(-half, half - 1).long() + half).bincount(minlength=self.bins)
        counts = torch.cat([bins, (h.abs() > self.saturated).sum()[None]]).cpu()
        self._counts[name] = self._counts.get(name, 0) + counts

    def state_dict(self) -> dict[str, Any]:
        return {"histograms": [tuple(histogram) for histogram in self._histograms]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._histograms = [Histogram(*histogram) for histogram in state_dict["histograms"]]
