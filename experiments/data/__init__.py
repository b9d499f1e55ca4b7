"""Text for language modelling: vocabularies, corpora, and windows over parallel streams."""

from experiments.data.text import TextData
from experiments.data.vocabulary import Vocabulary
from experiments.data.windows import Batch, Windows

__all__ = ["Batch", "TextData", "Vocabulary", "Windows"]
