"""Language modelling: predict each next symbol of a text."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils import _pytree as pytree

from experiments.core.errors import ExperimentError
from experiments.core.means import Mean
from experiments.core.processes import gathered, rank
from experiments.core.programs import Example
from experiments.core.task import Monitor, Stage, Task
from experiments.data.text import Batch, Vocabulary
from models import LanguageModel, sample


class LanguageModelling(Task):
    """Minimises −Σ log p(x_{t+1} | x_1 … x_t) by truncated back-propagation.

    The state is carried, without its gradient, from each batch to the next, and dropped where a batch `starts` its
    streams; training, validation and test carry one each. Logged are the loss in nats, `bpc` in bits per symbol, and
    the perplexity.

    Checkpoints hold the vocabulary and the state carried in training as plain values: a resumed run has the losses of
    an uninterrupted one, and `weights_only=True` loads it.

    Args:
        network: factory `(V) -> LanguageModel`; it is called when the data's vocabulary is known.
        optimizer, halve_after: see `Task`.
    """

    monitor = Monitor("bpc", "min")
    unit = "symbols"

    def __init__(
        self,
        network: Callable[[int], LanguageModel],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
    ) -> None:
        super().__init__(optimizer, halve_after)
        self._build_network = network
        self.vocabulary: Vocabulary | None = None
        self._carried: dict[Stage, Any] = {}

    def describe(self, data: LightningDataModule | None) -> dict[str, Any]:
        vocabulary = getattr(data, "vocabulary", None)
        if vocabulary is None:
            raise ExperimentError(
                f"LanguageModelling: the data are {type(data).__name__}, expected data with a vocabulary, as TextData."
            )
        return {"vocabulary": vocabulary.state_dict()}

    def build(self, description: dict[str, Any]) -> LanguageModel:
        self.vocabulary = Vocabulary.from_state_dict(description["vocabulary"])
        return self._build_network(len(self.vocabulary))

    def measure(self, batch: Batch, stage: Stage) -> dict[str, Mean]:
        count = batch.targets.numel()
        if count == 0:  # another process has the streams
            return {"loss": Mean(torch.zeros((), device=self.device), 0)}
        assert self.network is not None
        state = None if batch.starts else self._carried.get(stage)
        logits, state = self.network(batch.inputs, state)
        self._carried[stage] = pytree.tree_map(torch.Tensor.detach, state)
        return {"loss": Mean(nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), count)}

    def metrics(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        loss = means["loss"]
        return {"loss": loss, "bpc": loss / math.log(2), "perplexity": loss.exp()}

    def show(self) -> str:
        return f"A sample of what it writes:\n\n{self.text('', 300, temperature=0.8)}"

    def sizes(self) -> dict[str, Any]:
        assert self.vocabulary is not None
        return {"vocabulary_size": len(self.vocabulary)}

    def example(self) -> Example:
        assert isinstance(self.network, LanguageModel)
        tokens = torch.zeros(3, 2, dtype=torch.long)  # (T, B), which differ: else their axes would be taken for one
        _, state = self.network(tokens)
        fields = self.network.recurrent.directions[0].cell.initial_state(1)._fields  # type: ignore[union-attr, operator]
        inputs = {"tokens": {0: "T", 1: "B"}} | {name: {1: "B"} for name in fields}
        outputs = ("logits", *(f"new_{name}" for name in fields))
        return Example((tokens, state), inputs, outputs)

    def saved(self) -> dict[str, Any]:
        # The streams of all processes: any number of them can go on with their own.
        carried = [leaf.cpu() for leaf in pytree.tree_leaves(self._carried.get("train"))]
        return {"carried": [torch.cat(leaves, dim=1) for leaves in zip(*gathered(carried), strict=True)]}

    def restore(self, saved: dict[str, Any]) -> None:
        processes = len(gathered(None))
        carried = [leaf.tensor_split(processes, dim=1)[rank()].to(self.device) for leaf in saved["carried"]]
        self._carried["train"] = tuple(carried) if len(carried) > 1 else next(iter(carried), None)

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
