"""What is learnt from: a file or a folder for each kind of data."""

from experiments.data.functions import Curves, FunctionData, Images, Table
from experiments.data.synthetic import (
    Adding,
    AffineTasks,
    CopyMemory,
    Pairs,
    Recall,
    Sequences,
    SequentialDigits,
    StateMachine,
    SyntheticData,
    Teacher,
)
from experiments.data.text import Batch, TextData, Vocabulary, Windows, WordData, WordVocabulary, vocabulary_from

__all__ = [
    "Adding",
    "AffineTasks",
    "Batch",
    "CopyMemory",
    "Curves",
    "SyntheticData",
    "FunctionData",
    "Images",
    "Pairs",
    "Recall",
    "Sequences",
    "SequentialDigits",
    "StateMachine",
    "Table",
    "Teacher",
    "TextData",
    "Vocabulary",
    "Windows",
    "WordData",
    "WordVocabulary",
    "vocabulary_from",
]
