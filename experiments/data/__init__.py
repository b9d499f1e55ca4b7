"""What is learnt from: a file or a folder for each kind of data."""

from experiments.data.functions import Curves, FunctionData
from experiments.data.text import Batch, TextData, Vocabulary, Windows, WordData, WordVocabulary, vocabulary_from

__all__ = [
    "Batch",
    "Curves",
    "FunctionData",
    "TextData",
    "Vocabulary",
    "Windows",
    "WordData",
    "WordVocabulary",
    "vocabulary_from",
]
