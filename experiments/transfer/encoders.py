"""What gives vectors: checkpoints, functions, and what a checkpoint is to be held against."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.core.errors import ExperimentError
from experiments.core.loading import checkpoint_in, load_task
from experiments.data.sentences import words_of
from experiments.data.text import WordVocabulary
from experiments.sentence_encoder import SentenceEncoder
from experiments.tasks import SentenceVectors
from experiments.transfer.evaluation import Array, Encode
from models import SkipThought


class Arm(NamedTuple):
    """An encoder, or several that differ by their seed alone. Each is made when it is needed, and not kept."""

    name: str
    encoders: dict[int | None, Callable[[], Encode]]  # by seed; None: it is not drawn


def arms(
    given: Sequence[str],  # runs, checkpoints and functions
    untrained: int,  # how many untrained networks, and bags, stand beside a checkpoint
    device: str,
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
        task = _task(path)
        yield Arm(name, {None: lambda path=path: _encoder(_task(path), device)})
        yield Arm(f"{name}: bag", {None: lambda path=path: _bag(_task(path))})
        kind = task.settings.get("network"), task.description
        if untrained and kind not in seen:
            seen.append(kind)
            seeds = range(untrained)
            yield Arm(f"{name}: untrained", {s: lambda path=path, s=s: _encoder(_task(path, s), device) for s in seeds})
            yield Arm(f"{name}: bag, untrained", {s: lambda path=path, s=s: _bag(_task(path, s)) for s in seeds})


def _task(path: Path, seed: int | None = None) -> SentenceVectors:
    """The task of a checkpoint, with its trained network or, with a seed, a new one."""
    task = load_task(path)
    if not isinstance(task, SentenceVectors):
        raise ExperimentError(f"{path}: the checkpoint of a {type(task).__name__}, expected SentenceVectors.")
    if seed is not None:
        torch.manual_seed(seed)
        task.network = task.build(task.description)
    return task


def _parts(task: SentenceVectors) -> tuple[SkipThought, WordVocabulary]:
    assert isinstance(task.network, SkipThought)
    assert task.vocabulary is not None
    return task.network, task.vocabulary


def _encoder(task: SentenceVectors, device: str) -> Encode:
    network, vocabulary = _parts(task)
    return SentenceEncoder(network.to(device), vocabulary).encode


def _bag(task: SentenceVectors) -> Encode:
    """The mean of the embeddings of a sentence's words, each as often as it is there."""
    network, vocabulary = _parts(task)
    embeddings = network.embedding.weight.detach().numpy()
    numbers = {word: number for number, word in enumerate(vocabulary.words)}

    def encode(sentences: Sequence[str]) -> Array:
        rows = [[numbers.get(word, vocabulary.unknown) for word in words_of(sentence)] for sentence in sentences]
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
