"""Text for language modelling: vocabularies, corpora, and windows over parallel streams."""

from experiments.data.text.text_data import TextData
from experiments.data.text.vocabulary import Vocabulary
from experiments.data.text.windows import Batch, Windows
from experiments.data.text.word_data import WordData
from experiments.data.text.words import WordVocabulary, vocabulary_from

__all__ = ["Batch", "TextData", "Vocabulary", "Windows", "WordData", "WordVocabulary", "vocabulary_from"]
