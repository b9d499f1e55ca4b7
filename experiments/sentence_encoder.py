"""Vectors of sentences, from a checkpoint of a skip-thought model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from experiments.core.errors import ExperimentError
from experiments.core.loading import checkpoint_in, load_task
from experiments.core.trust import trusting
from experiments.data.sentences import words_of
from experiments.data.sentences.word_vectors import WordVectors, read_word_vectors
from experiments.data.text import WordVocabulary
from experiments.data.text.words import EOS, UNK
from experiments.tasks import SentenceVectors
from models import SkipThought

_LARGEST = 1 << 15  # words of a batch, padding included: one of 128 sentences with 256 words each


class SentenceEncoder:
    """Gives the vectors of sentences: `SentenceEncoder.load("runs/books/version_0").encode(["He ran.", "She sat."])`.

    Sentences are split into words as those of the training were (`experiments.data.sentences.words_of`). A word that
    the model does not know is `<unk>`, unless `expand` has given it an embedding.

    Args:
        network: trained or not; it is put into evaluation, and runs where it is.
        vocabulary: the words that its embedding is of.
    """

    def __init__(self, network: SkipThought, vocabulary: WordVocabulary) -> None:
        self.network, self.vocabulary = network.eval(), vocabulary
        self._numbers = {word: number for number, word in enumerate(vocabulary.words)}
        self._expansion: tuple[WordVectors, Tensor] | None = None  # and the map (D, E) to embeddings

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", trust: Sequence[str] = ()) -> Self:
        """The encoder of a checkpoint, or of a run's folder, whose best one is taken.

        Args:
            device: where the network runs, as torch calls it.
            trust: modules of your own whose classes the checkpoint may name; see `experiments.core.trust`.

        Raises: ExperimentError for the checkpoint of another task, and for a device that is not there.
        """
        return cls.of(load_sentence_vectors(Path(path), device, trust))

    @classmethod
    def of(cls, task: SentenceVectors) -> Self:
        """The encoder of a task whose network is built."""
        assert isinstance(task.network, SkipThought)
        assert task.vocabulary is not None
        return cls(task.network, task.vocabulary)

    def expand(self, path: str | Path) -> int:
        """Give words that the model does not know an embedding from word vectors; return how many both know.

        The file is in the text format of word2vec or GloVe. A linear map from its vectors to the model's embeddings is
        fitted by least squares to the words that both know, of which there must be as many at least as a vector has
        numbers. Words of the model keep their embeddings.
        Raises ExperimentError for a file that is none, and for too few words.
        Source: Kiros et al. 2015, section 2.2.
        """
        given = read_word_vectors(Path(path))
        both = [word for word in self.vocabulary.words if word in given.rows and word not in (EOS, UNK)]
        if len(both) < given.vectors.shape[1]:
            raise ExperimentError(
                f"{path}: {len(both)} of its words are known to the model, expected at least "
                f"{given.vectors.shape[1]}, as many as a vector has numbers: they do not determine the map."
            )
        vectors = torch.from_numpy(given.vectors[[given.rows[word] for word in both]]).double()
        E = self.network.embedding.weight.detach()
        own = E[[self._numbers[word] for word in both]].double().cpu()
        self._expansion = given, torch.linalg.lstsq(vectors, own).solution.to(E)
        return len(both)

    def known(self, sentences: Sequence[str]) -> float:
        """The share of the sentences' words that have an embedding."""
        words = [word for sentence in sentences for word in words_of(sentence)]
        given = self._expansion[0].rows if self._expansion else {}
        return sum(word in self._numbers or word in given for word in words) / max(1, len(words))

    @torch.no_grad()
    def encode(self, sentences: Iterable[str], batch_size: int = 128, progress: bool = False) -> np.ndarray:
        """The vectors of the sentences, (N, D) in float32, in their order.

        They are encoded in batches of like lengths. Which others are in its batch changes a vector by rounding at most.

        Args:
            batch_size: sentences in a batch at most; of long ones it has fewer.
            progress: show a bar on the terminal.

        Raises: ExperimentError for a text instead of a list of texts.
        """
        given = [] if isinstance(sentences, str) else [*sentences]
        if isinstance(sentences, str) or not all(isinstance(sentence, str) for sentence in given):
            raise ExperimentError(
                f"encode: got a {type(sentences).__name__}, expected a list of texts, a sentence each."
            )
        if batch_size < 1:
            raise ExperimentError(f"encode: batch_size is {batch_size}, expected at least 1.")
        rows, embeddings = self._numbered([words_of(sentence) for sentence in given])
        vectors = np.empty((len(rows), self.network.vector_size), np.float32)
        batches = _batches([len(row) for row in rows], batch_size)
        console = Console(stderr=True)
        for batch in track(batches, "encode", console=console, disable=not (progress and console.is_terminal)):
            words = pad_sequence([rows[i] for i in batch]).to(embeddings.device)
            lengths = torch.tensor([len(rows[i]) for i in batch], device=embeddings.device)
            v = self.network.vectors(nn.functional.embedding(words, embeddings), lengths)
            vectors[batch] = v.float().cpu().numpy()
        return vectors

    def _numbered(self, sentences: list[list[str]]) -> tuple[list[Tensor], Tensor]:
        """Each sentence's words and its end as rows of a table of embeddings, and the table."""
        numbers, table = self._numbers, self.network.embedding.weight
        if self._expansion is not None:
            given, map_to_embeddings = self._expansion
            strangers = dict.fromkeys(word for words in sentences for word in words if word not in numbers)
            found = [word for word in strangers if word in given.rows]
            numbers = numbers | {word: len(numbers) + i for i, word in enumerate(found)}
            vectors = torch.from_numpy(given.vectors[[given.rows[word] for word in found]]).to(table)
            table = torch.cat([table, vectors @ map_to_embeddings])
        unknown, end = self.vocabulary.unknown, self.vocabulary.start
        return [torch.tensor([*(numbers.get(word, unknown) for word in words), end]) for words in sentences], table


def load_sentence_vectors(path: Path, device: str, trust: Sequence[str]) -> SentenceVectors:
    """The task of a checkpoint, or of a run's folder, its network on the device; see `SentenceEncoder.load`."""
    checkpoint = checkpoint_in(path)
    with trusting(trust):
        task = load_task(checkpoint)
    if not isinstance(task, SentenceVectors):
        raise ExperimentError(f"{checkpoint}: the checkpoint of a {type(task).__name__}, expected SentenceVectors.")
    assert task.network is not None
    try:
        task.network.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise ExperimentError(f"device: got {device}: {str(error).splitlines()[0]}") from error
    return task


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The numbers of the sentences, the longest first, in batches."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, start = [], 0
    while start < len(order):
        end = start + min(size, max(1, _LARGEST // lengths[order[start]]))
        batches.append(order[start:end])
        start = end
    return batches
