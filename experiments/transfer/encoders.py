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
from experiments.core.trust import trusting
from experiments.data.sentences import words_of
from experiments.sentence_encoder import SentenceEncoder
from experiments.transfer.evaluation import Array

Encode = Callable[[Sequence[str]], Array]  # (N, D)
Load = Callable[[int | None], tuple[Any, SentenceEncoder]]


class Arm(NamedTuple):
    """An encoder, or several that differ by their seed alone. Each is made when it is needed, and not kept."""

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
        load = partial(_load, path, device, trust)
        kind = load(None)[0]
        yield Arm(name, {None: partial(_encode, load, None)})
        yield Arm(f"{name} (bag)", {None: partial(_bag, load, None)})
        if untrained and kind not in seen:
            seen.append(kind)
            seeds = range(untrained)
            yield Arm(f"{name} (untrained)", {seed: partial(_encode, load, seed) for seed in seeds})
            yield Arm(f"{name} (untrained bag)", {seed: partial(_bag, load, seed) for seed in seeds})


def _load(path: Path, device: str, trust: Sequence[str], seed: int | None) -> tuple[Any, SentenceEncoder]:
    """What decides a network before its training, and the trained encoder or, with a seed, one before any training."""
    encoder = SentenceEncoder.load(path, device, trust)
    with trusting(trust):
        task = load_task(path)
    if seed is not None:
        torch.manual_seed(seed)
        encoder = SentenceEncoder(task.build(task.description).to(device), encoder.vocabulary)
    return (task.settings.get("network"), task.description), encoder


def _encode(load: Load, seed: int | None) -> Encode:
    return load(seed)[1].encode


def _bag(load: Load, seed: int | None) -> Encode:
    """The mean of the embeddings of a sentence's words, each as often as it is there."""
    encoder = load(seed)[1]
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
