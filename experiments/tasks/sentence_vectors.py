"""Sentence vectors: what is learnt by writing the sentences beside each."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from experiments.core.errors import ExperimentError
from experiments.core.task import Data, Example, Mean, Monitor, Stage, Task
from experiments.data.sentences import Batch, Books
from experiments.data.text import WordVocabulary
from models import SkipThought


class SentenceVectors(Task):
    """Minimises −log Pr[previous, following | sentence], in nats per word of both; `perplexity` is its exponential.

    `experiments.sentence_encoder.SentenceEncoder` gives the vectors of a checkpoint.

    Args:
        network: factory `(V) -> SkipThought`; it is called when the data's vocabulary is known.
        optimizer, halve_after, average_after: see `Task`.
    """

    unit = "words"
    monitor = Monitor("perplexity", "min")

    def __init__(
        self,
        network: Callable[[int], SkipThought],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
        average_after: int | None = None,
    ) -> None:
        super().__init__(optimizer, halve_after, average_after)
        self._build_network = network
        self.vocabulary: WordVocabulary | None = None

    def describe(self, data: Data | None) -> dict[str, Any]:
        if not isinstance(data, Books):
            raise ExperimentError(f"SentenceVectors: the data are {type(data).__name__}, expected Books.")
        return {"vocabulary": data.vocabulary.state_dict()}

    def imagined(self, data: Data | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        size = sizes.get("vocabulary_size") or (data.words.max_vocabulary if isinstance(data, Books) else None)
        if size is None:
            raise ExperimentError("the vocabulary's size is not known without the data: give --vocabulary_size V.")
        return {"vocabulary_size": size}

    def build(self, description: dict[str, Any]) -> SkipThought:
        if "vocabulary_size" in description:  # imagined
            return self._build_network(description["vocabulary_size"])
        self.vocabulary = WordVocabulary.from_state_dict(description["vocabulary"])
        return self._build_network(len(self.vocabulary))

    def measure(self, batch: Batch, stage: Stage) -> dict[str, Mean]:
        assert isinstance(self.network, SkipThought)
        words = int(batch.previous.lengths.sum() + batch.following.lengths.sum())
        return {"loss": Mean(self.network.loss(*batch), words)}

    def metrics(self, means: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        return {"loss": means["loss"], "perplexity": means["loss"].exp()}

    def sizes(self) -> dict[str, Any]:
        assert self.vocabulary is not None
        return {"vocabulary_size": len(self.vocabulary)}

    def example(self) -> Example:
        words, lengths = torch.zeros(3, 2, dtype=torch.long), torch.tensor([3, 2])
        return Example((words, lengths), {"words": {0: "T", 1: "B"}, "lengths": {0: "B"}}, ("vectors",), 6)
