"""What is learnt from: a file or a folder for each kind of data."""

from experiments.data.text import Batch, TextData, Vocabulary, Windows, WordData, WordVocabulary, vocabulary_from

__all__ = ["Batch", "TextData", "Vocabulary", "Windows", "WordData", "WordVocabulary", "vocabulary_from"]
