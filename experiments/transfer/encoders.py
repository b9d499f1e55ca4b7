"""What gives vectors: checkpoints, functions, and what a checkpoint is to be held against."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.core.errors import ExperimentError
from experiments.data.sentences import words_of
from experiments.sentence_encoder import SentenceEncoder, load_sentence_vectors
from experiments.transfer.evaluation import Array

Encode = Callable[[Sequence[str]], Array]  # (N, D)


class Arm(NamedTuple):
    """An encoder, or several that are the same but for their seed: runs, or networks that are drawn when needed."""

    name: str
    encoders: dict[str, Callable[[], Encode]]  # by run or seed


def arms(
    given: Sequence[str],  # functions and runs, see below
    untrained: int,  # how many untrained networks, and bags, stand beside a run
    device: str,
    trust: Sequence[str] = (),  # modules whose classes the checkpoints may name
) -> Iterator[Arm]:
    """The encoders given, each run with a bag of its word embeddings; and untrained ones.

    An encoder is given as `module:function`, or as a run's folder or a checkpoint, several of which are separated by
    commas; before it there may be its name and =. Untrained ones are the same network with the same vocabulary before
    any training, and a bag of the embeddings of each, by the seeds 0, 1, …. Runs that differ in their weights alone
    share them.
    Raises ExperimentError for what is neither a checkpoint of `SentenceVectors` nor a function, and for runs of
    different networks that are given as one.
    """
    seen: list[Any] = []
    for text in given:
        name, _, encoder = ("", "", text) if Path(text).exists() else text.rpartition("=")
        name = name or encoder
        members = [encoder] if Path(encoder).exists() else encoder.split(",")
        if ":" in encoder and not Path(members[0]).exists():
            yield Arm(name, {"": _given(_function(encoder))})
            continue
        runs = {member: _Run(Path(member), device, trust) for member in members}
        first, *others = runs.values()
        for other in others:
            if other.kind != first.kind:
                raise ExperimentError(
                    f"{text}: {first.path} and {other.path} differ in more than weights, in their network or their "
                    "vocabulary. Give them as two encoders, with a space between them."
                )
        yield Arm(name, {member: _given(run.encoder.encode) for member, run in runs.items()})
        yield Arm(f"{name} (bag)", {member: partial(_bag, run.encoder) for member, run in runs.items()})
        if untrained and first.kind not in seen:
            seen.append(first.kind)
            made = {str(seed): partial(first.untrained, seed) for seed in range(untrained)}
            yield Arm(f"{name} (untrained)", {seed: lambda make=make: make().encode for seed, make in made.items()})
            yield Arm(f"{name} (untrained bag)", {seed: lambda make=make: _bag(make()) for seed, make in made.items()})


class _Run:
    """A checkpoint: its encoder, and others of its kind."""

    def __init__(self, path: Path, device: str, trust: Sequence[str]) -> None:
        self.path, self._device = path, device
        self._task = load_sentence_vectors(path, device, trust)
        self.encoder = SentenceEncoder.of(self._task)
        # What decides a network before its training.
        self.kind = self._task.settings.get("network"), self._task.description

    def untrained(self, seed: int) -> SentenceEncoder:
        torch.manual_seed(seed)
        network = self._task.build(self._task.description).to(self._device)
        return SentenceEncoder(network, self.encoder.vocabulary)


def _given(encode: Encode) -> Callable[[], Encode]:
    return lambda: encode


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
