"""What gives vectors: checkpoints, functions, and what a checkpoint is to be held against."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.core.errors import ExperimentError
from experiments.core.loading import checkpoint_in, load_task
from experiments.core.task import Task
from experiments.core.trust import trusting
from experiments.data.sentences import words_of
from experiments.data.text import WordVocabulary
from experiments.sentence_encoder import SentenceEncoder
from experiments.transfer.evaluation import Array

Encode = Callable[[Sequence[str]], Array]  # (N, D)


class Arm(NamedTuple):
    """An encoder, or several that differ by their seed alone; these are made when they are needed, and not kept."""

    name: str
    encoders: dict[int | None, Callable[[], Encode]]  # by seed; None: it is not drawn


def arms(
    given: Sequence[str],  # runs, checkpoints and functions
    untrained: int,  # how many untrained networks, and bags, stand beside a checkpoint
    device: str,
    trust: Sequence[str] = (),  # modules whose classes the checkpoints may name
) -> Iterator[Arm]:
    """The encoders given, each checkpoint with a bag of its word embeddings; and untrained ones.

    These are the same network with the same vocabulary before any training, and a bag of the embeddings of each, by
    the seeds 0, 1, …. Checkpoints that differ in their weights alone share them.
    Raises ExperimentError for what is neither a checkpoint of `SentenceVectors` nor a function.
    """
    seen: list[Any] = []
    for name in given:
        if ":" in name and not Path(name).exists():
            function = _function(name)
            yield Arm(name, {None: lambda function=function: function})
            continue
        path = checkpoint_in(Path(name))
        encoder = SentenceEncoder.load(path, device, trust)
        yield Arm(name, {None: lambda encoder=encoder: encoder.encode})
        yield Arm(f"{name} (bag)", {None: partial(_bag, encoder)})
        with trusting(trust):
            task = load_task(path)
        kind = task.settings.get("network"), task.description
        if untrained and kind not in seen:
            seen.append(kind)
            made = {seed: partial(_untrained, task, encoder.vocabulary, device, seed) for seed in range(untrained)}
            yield Arm(f"{name} (untrained)", {seed: lambda make=make: make().encode for seed, make in made.items()})
            yield Arm(f"{name} (untrained bag)", {seed: lambda make=make: _bag(make()) for seed, make in made.items()})


def _untrained(task: Task, vocabulary: WordVocabulary, device: str, seed: int) -> SentenceEncoder:
    torch.manual_seed(seed)
    return SentenceEncoder(task.build(task.description).to(device), vocabulary)


def _bag(encoder: SentenceEncoder) -> Encode:
    """The mean of the embeddings of a sentence's words, each as often as it is there."""
    embeddings = encoder.network.embedding.weight.detach().cpu().numpy()
    unknown = encoder.vocabulary.unknown
    numbers = {word: number for number, word in enumerate(encoder.vocabulary.words)}

    def encode(sentences: Sequence[str]) -> Array:
        rows = [[numbers.get(word, unknown) for word in words_of(sentence)] for sentence in sentences]
        return np.stack([embeddings[row].mean(0) if row else np.zeros_like(embeddings[0]) for row in rows])

    return encode


def _function(name: str) -> Encode:
    """What `module:function` names; naming it imports the module."""
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExperimentError(
            f"{name}: there is no such checkpoint, and as module:function it cannot be found: {error}."
        ) from error
    if not callable(found):
        raise ExperimentError(f"{name}: a {type(found).__name__}, expected a function of a list of sentences.")
    return found
