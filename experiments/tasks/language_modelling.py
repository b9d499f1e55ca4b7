"""Language modelling: predict each next symbol of a text."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils import _pytree as pytree

from experiments.core.errors import ExperimentError
from experiments.core.task import Data, Example, Mean, Monitor, Stage, Task, gathered, rank
from experiments.data.text import Batch, Vocabulary, WordVocabulary, vocabulary_from
from models import Features, LanguageModel, sample, softmax_cross_entropy, symbol_losses


class LanguageModelling(Task):
    """Minimises −Σ log p(x_{t+1} | x_1 … x_t) by truncated back-propagation.

    The state is carried, without its gradient, from each batch to the next, and dropped where a batch `starts` its
    streams; training, validation and test carry one each. Logged are the loss in nats, `bpc` in bits per symbol, and
    the perplexity.

    A network that always carries its state meets the initial one once an epoch, and may never learn to leave it: an
    evaluation then measures the start and not the model. So in training a stream returns to it now and then, and an
    evaluation of several streams logs the worst of them as `worst_bpc`, and warns of those above log2 V bits, which is
    what guessing takes.

    Checkpoints hold the vocabulary and the state carried in training as plain values: a resumed run has the losses of
    an uninterrupted one, and `weights_only=True` loads it.

    Args:
        network: factory `(V) -> LanguageModel`; it is called when the data's vocabulary is known.
        optimizer, halve_after, average_after: see `Task`. Dense gradients only: a softmax, tied or not, has one of
            every symbol.
        metric: what is shown, and decides which checkpoint is best: bits per symbol, or for words the perplexity.
        restart: probability that a stream of training returns to the initial state before a window.
        activation_penalty: α of the penalty α·mean(h²) on the stack's output after dropout (Merity et al. 2018).
        change_penalty: β of the penalty β·mean((h_t − h_{t−1})²) on it before dropout.
    """

    unit = "symbols"

    def __init__(
        self,
        network: Callable[[int], LanguageModel],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
        average_after: int | None = None,
        metric: Literal["bpc", "perplexity"] = "bpc",
        restart: float = 0.01,
        activation_penalty: float = 0.0,
        change_penalty: float = 0.0,
    ) -> None:
        self.monitor = Monitor(metric, "min")
        super().__init__(optimizer, halve_after, average_after)
        if not 0 <= restart <= 1:
            raise ExperimentError(f"LanguageModelling: restart is {restart}, expected a probability.")
        for name, value in {"activation_penalty": activation_penalty, "change_penalty": change_penalty}.items():
            if not value >= 0:
                raise ExperimentError(f"LanguageModelling: {name} is {value}, expected at least 0.")
        self.restart, self.activation_penalty, self.change_penalty = restart, activation_penalty, change_penalty
        self._build_network = network
        self.vocabulary: Vocabulary | WordVocabulary | None = None
        self._carried: dict[Stage, Any] = {}
        self._stream_losses: dict[Stage, Tensor] = {}  # (B,), of the evaluation under way

    def imagined(self, data: Data | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        size = sizes.get("vocabulary_size") or getattr(data, "known_vocabulary_size", None)
        if size is None:
            raise ExperimentError("the vocabulary's size is not known without the data: give --vocabulary_size V.")
        return {"vocabulary_size": size}

    def describe(self, data: Data | None) -> dict[str, Any]:
        vocabulary = getattr(data, "vocabulary", None)
        if vocabulary is None:
            raise ExperimentError(
                f"LanguageModelling: the data are {type(data).__name__}, expected data with a vocabulary, "
                "as TextData or WordData."
            )
        return {"vocabulary": vocabulary.state_dict()}

    def build(self, description: dict[str, Any]) -> LanguageModel:
        if "vocabulary_size" in description:  # imagined
            return self._build_network(description["vocabulary_size"])
        self.vocabulary = vocabulary_from(description["vocabulary"])
        return self._build_network(len(self.vocabulary))

    def measure(self, batch: Batch, stage: Stage) -> dict[str, Mean]:
        count = batch.targets.numel()
        if count == 0:  # another process has the streams
            return {"loss": Mean(torch.zeros((), device=self.device), 0)}
        network = self.network
        assert isinstance(network, LanguageModel)
        state = None if batch.starts else self._carried.get(stage)
        if state is not None and stage == "train" and self.restart:
            state = network.restarted(state, torch.rand(batch.inputs.shape[1], device=self.device) < self.restart)
        features = network.features(batch.inputs, state)
        self._carried[stage] = pytree.tree_map(torch.Tensor.detach, features.state)
        softmax = features.softmax.flatten(0, 1), network.decoder.weight, network.decoder.bias
        if stage == "train":
            loss = softmax_cross_entropy(*softmax, batch.targets.flatten())
            return {"loss": Mean(loss, count)} | self._penalty(features, count)
        losses = symbol_losses(*softmax, batch.targets.flatten()).view_as(batch.targets)
        self._stream_losses[stage] = losses.sum(0) + (0 if batch.starts else self._stream_losses[stage])
        return {"loss": Mean(losses.mean(), count)}

    def metrics(self, means: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        loss = means["loss"]
        metrics = {"loss": loss, "bpc": loss / math.log(2), "perplexity": loss.exp()}
        if stage != "train":
            metrics |= self._worst(loss, stage)
        return metrics

    def last_loss(self, network: nn.Module, batch: Batch, steps: int) -> Tensor:
        """See `Task`. Each window of the batch is cut into as many sequences as it has room for."""
        assert isinstance(network, LanguageModel)
        inputs, targets = _cut(batch.inputs, steps), _cut(batch.targets, steps)[-1]
        softmax = network.features(inputs).softmax[-1], network.decoder.weight, network.decoder.bias
        return len(targets) * softmax_cross_entropy(*softmax, targets)

    def _penalty(self, features: Features, count: int) -> dict[str, Mean]:
        if not (self.activation_penalty or self.change_penalty):
            return {}
        penalty = self.activation_penalty * features.recurrent.square().mean()
        if len(features.undropped) > 1:
            penalty = penalty + self.change_penalty * features.undropped.diff(dim=0).square().mean()
        return {"penalty": Mean(penalty, count)}

    def _worst(self, loss: Tensor, stage: Stage) -> dict[str, Tensor]:
        """The bits per symbol of the worst stream, where there are several: all of them have as many symbols."""
        assert self.vocabulary is not None
        of_streams = torch.cat([losses.cpu() for losses in gathered(self._stream_losses.get(stage, torch.empty(0)))])
        if len(of_streams) < 2:
            return {}
        bits = of_streams / of_streams.mean() * loss.cpu() / math.log(2)
        lost = int((bits > math.log2(len(self.vocabulary))).sum())
        if lost and rank() == 0 and not self.is_trial:
            warnings.warn(
                f"{lost} of {len(bits)} streams take more bits than guessing: they may have fallen into a state that "
                "training never met. Raise --model.restart, or learn the initial state (learnt_state).",
                stacklevel=2,
            )
        return {"worst_bpc": bits.max().to(loss.device)}  # where processes exchange what is logged

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
        return Example((tokens, state), inputs, outputs, tokens.numel())

    def saved(self) -> dict[str, Any]:
        # The streams of all processes: any number of them can go on with their own.
        state = self._carried.get("train")
        carried = [] if state is None else [leaf.cpu() for leaf in pytree.tree_leaves(state)]
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
        unk: bool = False,
    ) -> str:
        """The prompt and what the network writes after it; see `models.sample`.

        Of words, `<unk>` is drawn with `unk` only. Without a prompt the network reads the vocabulary's `start`.
        Raises ExperimentError for a symbol of the prompt that is not in the vocabulary.
        """
        assert self.vocabulary is not None
        assert self.network is not None
        given = self.vocabulary.encode(prompt) if prompt else torch.empty(0, dtype=torch.long)
        read = given if len(given) else torch.tensor([self.vocabulary.start])
        banned = () if unk or self.vocabulary.unknown is None else (self.vocabulary.unknown,)
        drawn = sample(self.network, read.to(self.device), length, temperature, top_k, generator, banned)
        return self.vocabulary.decode(torch.cat([given, drawn.cpu()]))


def _cut(
    tokens: Tensor,  # (T, B)
    steps: int,
) -> Tensor:  # (steps, ⌊T / steps⌋ · B)
    count = len(tokens) // steps
    if count == 0:
        raise ExperimentError(
            f"LanguageModelling: the windows have {len(tokens)} symbols, expected at least {steps}. Raise "
            "--data.eval_length, or lower the length of the analysis."
        )
    return tokens[: count * steps].unflatten(0, (count, steps)).transpose(0, 1).flatten(1)
