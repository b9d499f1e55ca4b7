"""Reading: questions on documents."""

from experiments.data.reading.babi import BAbI
from experiments.data.reading.novels import NovelCloze
from experiments.data.reading.question_files import QuestionFiles
from experiments.data.reading.questions import Batch, Question
from experiments.data.reading.reading_data import ReadingData
from experiments.data.reading.wording import Wording

__all__ = ["BAbI", "Batch", "NovelCloze", "Question", "QuestionFiles", "ReadingData", "Wording"]
