"""What a decoder is."""

import warnings
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from experiments.data.speech import Labelling


class Decoder(ABC):
    """Finds what was said. Built as `Class(labelling, **settings)`.

    Args:
        labelling: the units, the counts of labels and the transcripts of training.
    """

    finds_words: ClassVar[bool] = True  # of phones too, which takes a lexicon; otherwise these

    def __init__(self, labelling: Labelling) -> None:
        self.units = labelling.units

    @abstractmethod
    def __call__(
        self,
        log_posteriors: Tensor,  # (T, B, V), label 0 the blank
        lengths: Tensor,  # (B,) int64
    ) -> list[str]:
        """The text of each utterance, with one space between words, or between phones where it finds no words."""


class BeamSearch(Decoder):
    """A decoder that follows the best hypotheses of each utterance by itself, and may lose all whole sentences.

    A subclass states `scores` and `best`, and `wider`: the setting that lets it follow more.
    """

    wider: str

    @abstractmethod
    def scores(self, log_posteriors: Tensor) -> Tensor:  # (T, B, V), on the CPU
        """What the search adds up of the log posteriors."""

    @abstractmethod
    def best(
        self,
        scores: Tensor,  # (T, V), contiguous
    ) -> tuple[str, bool]:
        """The text, and whether it is a whole sentence."""

    def __call__(self, log_posteriors: Tensor, lengths: Tensor) -> list[str]:
        scores = self.scores(log_posteriors.detach().float().cpu())
        found = [self.best(scores[:length, row].contiguous()) for row, length in enumerate(lengths.tolist())]
        if lost := sum(not is_whole for _, is_whole in found):
            warnings.warn(
                f"{type(self).__name__}: of {lost} utterances no whole sentence was left in the beam, and what there "
                f"is was taken: raise the {self.wider}.",
                stacklevel=2,
            )
        return [text for text, _ in found]
