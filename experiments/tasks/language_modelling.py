"""Language modelling: predict each next symbol of a text."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils import _pytree as pytree
from torchmetrics import MeanMetric

from experiments.core.errors import ExperimentError, building
from experiments.core.randomness import random_state, set_random_state
from experiments.data.text.vocabulary import Vocabulary
from experiments.data.text.windows import Batch
from models import LanguageModel, sample

Stage = Literal["train", "val", "test"]


class LanguageModelling(LightningModule):
    """Minimises −Σ log p(x_{t+1} | x_1 … x_t) by truncated back-propagation.

    The state is carried, without its gradient, from each batch to the next, and dropped where a batch `starts` its
    streams; training, validation and test carry one each. Logged are the loss in nats, `bpc` in bits per symbol, and in
    evaluation the perplexity, each exactly over all symbols.

    Checkpoints hold the vocabulary, the carried state and the state of the random generators as plain values: a resumed
    run has the losses of an uninterrupted one, and `weights_only=True` loads it.

    Args:
        network: factory `(V) -> LanguageModel`; it is called when the data's vocabulary is known.
        optimizer: factory `(parameters) -> Optimizer`.
        halve_after: halve the learning rate after that many validations without a gain in bits per symbol.

    Raises: ExperimentError for a `halve_after` below 1, and for a checkpoint of other settings or another vocabulary.
    """

    def __init__(
        self,
        network: Callable[[int], LanguageModel],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
    ) -> None:
        super().__init__()
        if halve_after is not None and halve_after < 1:
            raise ExperimentError(f"LanguageModelling: halve_after is {halve_after}, expected at least 1, or null.")
        self.save_hyperparameters(logger=False)
        if "_instantiator" not in self.hparams:
            # Built in Python, not from a config: the factories are code, and a checkpoint holds values only.
            self.hparams.clear()
        self._build_network = network
        self._build_optimizer = optimizer
        self._halve_after = halve_after
        self.vocabulary: Vocabulary | None = None
        self.network: LanguageModel | None = None
        self.mean_loss = MeanMetric()  # of the evaluation under way
        self._carried: dict[Stage, Any] = {}
        self._random_state_to_restore: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Build the network for the vocabulary of the data, if it is not there yet."""
        self._use(self.trainer.datamodule.vocabulary)

    def configure_optimizers(self) -> Any:
        with building("LanguageModelling: the optimizer"):
            optimizer = self._build_optimizer(self.parameters())
        if self._halve_after is None:
            return optimizer
        # It halves when more than `patience` validations in a row brought no gain, however small.
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=self._halve_after - 1, threshold=0.0)
        # Lightning keeps its state but never steps it: that would come after the checkpoint of a validation is written,
        # and a resumed run would miss the step.
        never = {"interval": "step", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/bpc", **never}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # As late as this, since building iterators and Lightning's sanity check may draw random numbers too.
        if self._random_state_to_restore is not None:
            set_random_state(self._random_state_to_restore)
            self._random_state_to_restore = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss("train", batch)
        self.log_dict({"train/loss": loss, "train/bpc": loss.detach() / math.log(2)}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.mean_loss.update(self._loss("val", batch), batch.targets.numel())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.mean_loss.update(self._loss("test", batch), batch.targets.numel())

    def on_validation_epoch_end(self) -> None:
        bpc = self._log_evaluation("val")
        if self._halve_after is not None and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.lr_schedulers().step(bpc)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.vocabulary is not None
        checkpoint["vocabulary"] = self.vocabulary.state_dict()
        checkpoint["carried"] = pytree.tree_leaves(self._carried.get("train"))
        checkpoint["random_state"] = random_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if missing := {"vocabulary", "carried", "random_state"} - checkpoint.keys():
            raise ExperimentError(
                f"LanguageModelling: the checkpoint is another task's: it has no {', '.join(sorted(missing))}."
            )
        self._use(Vocabulary.from_state_dict(checkpoint["vocabulary"]))
        self._refuse_other_settings(checkpoint)
        carried = [tensor.to(self.device) for tensor in checkpoint["carried"]]
        self._carried["train"] = tuple(carried) if len(carried) > 1 else next(iter(carried), None)
        self._random_state_to_restore = checkpoint["random_state"]

    def text(
        self,
        prompt: str,
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> str:
        """The prompt and what the network writes after it; see `models.sample`.

        Raises ExperimentError for a symbol of the prompt that is not in the vocabulary.
        """
        assert self.vocabulary is not None
        assert self.network is not None
        # Without a prompt the network reads the first symbol in order: in most texts the newline, or the space.
        ids = (self.vocabulary.encode(prompt) if prompt else torch.zeros(1, dtype=torch.long)).to(self.device)
        drawn = sample(self.network, ids, length, temperature, top_k, generator)
        return self.vocabulary.decode(torch.cat([ids, drawn]) if prompt else drawn)

    def _use(self, vocabulary: Vocabulary) -> None:
        if self.network is None:
            with building("LanguageModelling: the network"):
                self.vocabulary, self.network = vocabulary, self._build_network(len(vocabulary))
        elif vocabulary != self.vocabulary:
            raise ExperimentError(
                f"LanguageModelling: the checkpoint's vocabulary is {vocabulary!r}, the data's is {self.vocabulary!r}, "
                "with other symbols. Give the data that the checkpoint was trained on."
            )

    def _refuse_other_settings(self, checkpoint: dict[str, Any]) -> None:
        # Training goes on with the checkpoint's optimiser state, learning rate included: other settings would silently
        # have no effect. Evaluation needs the same parameters only.
        saved, asked = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY), dict(self.hparams)
        differences = list(_differences(saved, asked)) if saved and asked else []
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        fits = shapes == {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if differences and not (fits and self._trainer is not None and self.trainer.state.fn != "fit"):
            raise ExperimentError(
                "LanguageModelling: the checkpoint is of a run with other settings. Give those, or train anew without "
                f"--ckpt_path. They differ in {'; '.join(differences)}."
            )

    def _loss(self, stage: Stage, batch: Batch) -> Tensor:
        assert self.network is not None
        state = None if batch.starts else self._carried.get(stage)
        logits, state = self.network(batch.inputs, state)
        self._carried[stage] = pytree.tree_map(torch.Tensor.detach, state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def _log_evaluation(self, stage: Stage) -> Tensor:
        loss = self.mean_loss.compute()
        self.mean_loss.reset()
        bpc = loss / math.log(2)
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/bpc", bpc, prog_bar=True)
        self.log(f"{stage}/perplexity", loss.exp())
        return bpc


def _differences(saved: Any, asked: Any, path: str = "model") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        for key in sorted(saved.keys() | asked.keys()):
            yield from _differences(saved.get(key), asked.get(key), f"{path}.{key}")
    elif saved != asked:
        yield f"{path} (saved {saved!r}, asked {asked!r})"
