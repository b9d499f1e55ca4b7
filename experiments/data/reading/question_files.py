"""The questions of Hermann et al. 2015 on news of CNN and the Daily Mail, as they are published: a file for each."""

from collections.abc import Iterator
from pathlib import Path

from experiments.core.errors import ExperimentError
from experiments.data.reading.questions import PLACEHOLDER, Question
from experiments.data.reading.reading_data import ReadingData
from experiments.data.reading.wording import marker_number

_FOLDERS = {"train": "training", "valid": "validation", "test": "test"}


class QuestionFiles(ReadingData):
    """`.question` files in the folders `training`, `validation` and `test`.

    With `sentences`, a document is cut to those that have most words of the question, which need not have the answer:
    the `answerable` of the test is the share that have, above which no reader comes but by chance. The choice is ours.

    Args:
        path: the folder with the three, as `cnn/questions`.
        sentences: of a document that are read, in their order; None: all.
        max_words, min_count, renumber, batch_size, seed: see `ReadingData`.
    """

    def __init__(
        self,
        path: str,
        sentences: int | None = None,
        max_words: int | None = None,
        min_count: int = 1,
        renumber: bool = True,
        batch_size: int = 64,
        seed: int | None = None,
    ) -> None:
        super().__init__(max_words, min_count, renumber, batch_size, seed)
        if sentences is not None and sentences < 1:
            raise ExperimentError(f"--data.sentences: got {sentences}, expected at least 1, or null.")
        self.path, self.sentences = Path(path).expanduser(), sentences

    def _questions(self, split: str) -> Iterator[Question]:
        folder = self.path / _FOLDERS[split]
        files = sorted(folder.glob("*.question"))
        if not files:
            raise ExperimentError(
                f"{folder}: there are no .question files. Give by --data.path the folder that has "
                f"{', '.join(_FOLDERS.values())}."
            )
        for file in files:
            question = read_question(file)
            if self.sentences is not None:
                question = question._replace(document=cut(question.document, question.query, self.sentences))
            yield question


def read_question(path: Path) -> Question:
    """The question in a file: address, document, query, answer and names of entities, with blank lines between them.

    Raises ExperimentError for a file that is empty or not of that form, for a query without `@placeholder`, and for an
    answer that is no `@entityN` or not in the document.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: no text in UTF-8 that can be read ({error}).") from error
    if not text.strip():
        raise ExperimentError(f"{path}: the file is empty, expected a question.")
    parts = text.strip().split("\n\n")
    if len(parts) < 4:
        raise ExperimentError(
            f"{path}: it has {len(parts)} parts with blank lines between them, expected address, document, query, "
            "answer and the entities' names."
        )
    _, document, query, answer, *_ = parts
    words, asked, answer = document.split(), query.split(), answer.strip()
    if PLACEHOLDER not in asked:
        raise ExperimentError(f"{path}: the query is {query[:60]!r}, expected one with {PLACEHOLDER}.")
    if marker_number(answer) is None:
        raise ExperimentError(f"{path}: the answer is {answer[:60]!r}, expected @entityN.")
    if answer not in words:
        raise ExperimentError(f"{path}: the answer {answer} is not in the document.")
    return Question(path.stem, words, asked, answer)


def cut(document: list[str], query: list[str], sentences: int) -> list[str]:
    """The sentences that have most distinct words of the query, the earlier of equal ones first, in their order."""
    ends = [i + 1 for i, word in enumerate(document) if word in (".", "!", "?")]
    if not ends or ends[-1] < len(document):
        ends.append(len(document))
    parts = [document[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    asked = set(query)
    best = sorted(range(len(parts)), key=lambda i: -len(asked.intersection(parts[i])))[:sentences]
    return [word for i in sorted(best) for word in parts[i]]
