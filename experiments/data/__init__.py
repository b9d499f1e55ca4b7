"""What is learnt from: a file or a folder for each kind of data."""

from experiments.data.functions import Curves, FunctionData, Images, Table
from experiments.data.reading import BAbI, NovelCloze, QuestionFiles, ReadingData
from experiments.data.sentences import Books
from experiments.data.speech import AN4, Labelling, Recordings, SpeechData, Units, YesNo
from experiments.data.synthetic import (
    Adding,
    AffineTasks,
    CopyMemory,
    Pairs,
    Recall,
    RegularLanguage,
    Sequences,
    SequentialDigits,
    StateMachine,
    SyntheticData,
    Teacher,
)
from experiments.data.text import Batch, TextData, Vocabulary, Windows, WordData, WordVocabulary, vocabulary_from

__all__ = [
    "AN4",
    "Adding",
    "AffineTasks",
    "BAbI",
    "Batch",
    "Books",
    "CopyMemory",
    "Curves",
    "SyntheticData",
    "FunctionData",
    "Images",
    "Labelling",
    "NovelCloze",
    "Pairs",
    "QuestionFiles",
    "ReadingData",
    "Recall",
    "Recordings",
    "RegularLanguage",
    "Sequences",
    "SequentialDigits",
    "SpeechData",
    "StateMachine",
    "Table",
    "Teacher",
    "TextData",
    "Units",
    "Vocabulary",
    "Windows",
    "WordData",
    "WordVocabulary",
    "YesNo",
    "vocabulary_from",
]
