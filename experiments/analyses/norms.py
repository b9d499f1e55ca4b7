"""Norms on one fixed batch of the validation: of gradients by the step that they reach, and of the two streams."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments.analyses.recording import Recording, named, norms, recorded
from experiments.core.errors import ExperimentError
from experiments.core.task import gathered


class BatchAnalysis(Callback):
    """Runs the network over sequences of each validation's first batch, from the initial state, and logs means.

    Args:
        length: T, the steps of a sequence.

    Raises: ExperimentError for a length below 1, and where the network or its task cannot be looked at.
    """

    def __init__(self, length: int = 50) -> None:
        if length < 1:
            raise ExperimentError(f"{type(self).__name__}: length is {length}, expected at least 1.")
        self.length = length
        self._batch: Any = None

    @abstractmethod
    def values(self, recording: Recording) -> dict[str, Tensor]:
        """What is logged of a pass, by name, a number for each sequence (N,)."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == dataloader_idx == 0:
            self._batch = batch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._batch is None:
            return
        # Lightning evaluates without autograd, and what was made there takes no part in it.
        with torch.inference_mode(False), torch.enable_grad():
            batch = pytree.tree_map_only(Tensor, Tensor.clone, self._batch)
            values = self.values(recorded(pl_module.task, batch, self.length))
        self._batch = None
        if trainer.sanity_checking:  # what cannot be looked at is told before the run has cost anything
            return
        for name, of_sequences in values.items():
            of_all = torch.cat(gathered(of_sequences.detach().cpu()))
            # Every process has the same value already; Lightning warns unless told to average.
            pl_module.log(f"val/{name}", of_all.mean().item(), sync_dist=True)


class GradientNorms(BatchAnalysis):
    """Logs `val/log10_gradient_t`: log10 ‖∂C/∂h_t‖₂, the mean over sequences, where C is the loss at the last step T.

    t = 0 is the initial state. Of several layers each has its own, `val/log10_gradient_t_layer_0`, and a layer's
    backward direction counts its steps from the end.

    Args:
        steps: the t.
        length: T.

    Raises: ExperimentError for steps outside 0 … T.
    Source: Wu et al. 2016, section 3.1.1 and figure 1 (a), for the mean over the training set, T = 50, and t = 0, 5, 10
        in the text, 1, 5, 10 in the caption.
    """

    def __init__(self, steps: Sequence[int] = (0, 5, 10), length: int = 50) -> None:
        super().__init__(length)
        if wrong := [t for t in steps if not 0 <= t <= length]:
            raise ExperimentError(f"GradientNorms: step {wrong[0]} is none of 0 … {length}, the length.")
        self.steps = tuple(steps)

    def values(self, recording: Recording) -> dict[str, Tensor]:
        states = {
            named(f"log10_gradient_{t}", layer.name): layer.states[t] for layer in recording.layers for t in self.steps
        }
        gradients = torch.autograd.grad(recording.loss, list(states.values()))
        # A sequence's loss depends on its own states alone, so the gradient of the sum holds those of all.
        return {name: g.norm(dim=-1).log10() for name, g in zip(states, gradients, strict=True)}


class StreamNorms(BatchAnalysis):
    """Logs `val/norm_wx` and `val/norm_uh`: ‖Wx_t‖₂ and ‖Uh_{t−1}‖₂, the means over steps and sequences.

    W are all matrices of a layer's integrators that x alone enters by, one below the other, U those of z alone, and h
    is what they multiply: in a GRU's candidate r ⊙ h, and in a Mogrifier, whose rounds count too, x in every second
    round. Of several layers each has its own, `val/norm_wx_layer_0`.

    Raises: ExperimentError for a layer without such matrices, as of `Concat` and `Bilinear`, where both enter by one.
    Source: Wu et al. 2016, section 3.1.2.
    """

    def values(self, recording: Recording) -> dict[str, Tensor]:
        values = {}
        for layer in recording.layers:
            for stream, name in (("x", "norm_wx"), ("z", "norm_uh")):
                of_steps = list(norms(layer, stream))
                if not of_steps:
                    raise ExperimentError(
                        f"StreamNorms: no integrator has a matrix that {stream} alone enters by. Leave the analysis "
                        "out, or choose an integrator with two products, such as Additive instead of Concat."
                    )
                values[named(name, layer.name)] = torch.stack(of_steps).mean(0)
        return values
