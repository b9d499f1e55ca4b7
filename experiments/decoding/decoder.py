"""What a decoder is."""

from abc import ABC, abstractmethod

from torch import Tensor

from experiments.data.speech import Labelling


class Decoder(ABC):
    """Finds what was said. Built as `Class(labelling, **settings)`.

    Args:
        labelling: the units, the counts of labels and the transcripts of training.
    """

    def __init__(self, labelling: Labelling) -> None:
        self.units = labelling.units

    @abstractmethod
    def __call__(
        self,
        log_posteriors: Tensor,  # (T, B, V), label 0 the blank
        lengths: Tensor,  # (B,) int64
    ) -> list[str]:
        """The text of each utterance, with one space between words; of phones without a language model, these."""
