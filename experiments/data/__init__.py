"""What is learnt from: a file or a folder for each kind of data."""

from experiments.data.functions import Curves, FunctionData, Images, Table
from experiments.data.synthetic import AffineTasks, DrawnData, Pairs, Sequences, StateMachine, Teacher
from experiments.data.text import Batch, TextData, Vocabulary, Windows, WordData, WordVocabulary, vocabulary_from

__all__ = [
    "AffineTasks",
    "Batch",
    "Curves",
    "DrawnData",
    "FunctionData",
    "Images",
    "Pairs",
    "Sequences",
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
