"""bAbI: twenty tasks of made-up stories, each with questions that need one kind of reasoning."""

import re
from collections.abc import Iterator
from pathlib import Path

from experiments.core.errors import ExperimentError
from experiments.data.archives import read_archive
from experiments.data.reading.questions import Question
from experiments.data.reading.reading_data import ReadingData

TASKS = range(1, 21)
_FOLDER = "en-valid"
_TOKEN = re.compile(r"\w+|[^\w\s]")


class BAbI(ReadingData):
    """1000 questions of each task, of which the corpus keeps about 100 for validation, and 1000 others to test.

    The document is all of the story that precedes the question. Words are in lower case; an answer of several words,
    as of tasks 8 and 19, is one answer. An answer that the training has not can only be wrong.

    Args:
        root: the folder in which `babi` lies, with `en-valid` or as an archive, or that folder itself.
        tasks: one, or those to learn together, by number; None: all.
        batch_size, seed: see `ReadingData`.

    Source: Weston et al. 2015, version 1.2.
    """

    def __init__(
        self, root: str, tasks: int | list[int] | None = None, batch_size: int = 32, seed: int | None = None
    ) -> None:
        super().__init__(None, 1, False, batch_size, seed)
        self.root = Path(root).expanduser()
        self.tasks = [tasks] if isinstance(tasks, int) else list(TASKS if tasks is None else tasks)
        if not self.tasks or set(self.tasks) - set(TASKS) or len(set(self.tasks)) < len(self.tasks):
            raise ExperimentError(f"--data.tasks: got {self.tasks}, expected distinct numbers from 1 to {TASKS[-1]}.")
        self._contents: dict[str, bytes] | None = None  # of an archive

    def _questions(self, split: str) -> Iterator[Question]:
        for task in self.tasks:
            name = f"{_FOLDER}/qa{task}_{split}.txt"
            yield from read_stories(self._read(name), name, str(task))

    def _read(self, name: str) -> str:
        folders = [self.root / "babi", self.root, self.root.parent]
        if found := [folder for folder in folders if (folder / name).is_file()]:
            return _decoded((found[0] / name).read_bytes(), name)
        if self._contents is None:
            patterns = ("babi*.tar.*", "tasks_1-20*.tar.*")
            archives = [path for folder in folders[:2] for pattern in patterns for path in folder.glob(pattern)]
            self._contents = read_archive(archives[0]) if archives else {}
        if name not in self._contents:
            raise ExperimentError(
                f"{self.root}: there is no {name} of bAbI, nor an archive babi*.tar.* that has it. "
                "Say by --data.root in which folder it lies."
            )
        return _decoded(self._contents[name], name)


def read_stories(text: str, name: str, group: str = "") -> Iterator[Question]:
    """The questions in a file of bAbI's format: lines NUMBER SENTENCE, or NUMBER QUESTION, tab, ANSWER, tab, ….

    A story begins where the number is 1. Raises ExperimentError for an empty file, for a line that is neither, or a
    question without an answer or a story, and where lines are missing.
    """
    story: list[str] = []
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ExperimentError(f"{name}: the file is empty, expected stories and questions.")
    last, answer = 0, list[str]()
    for place, line in enumerate(lines, start=1):
        number, _, rest = line.partition(" ")
        if not number.isdigit() or not rest.strip():
            raise ExperimentError(f"{name}, line {place}: got {line[:60]!r}, expected NUMBER SENTENCE.")
        if int(number) not in (1, last + 1):
            raise ExperimentError(
                f"{name}, line {place}: got the number {number}, expected {last + 1}: lines are missing."
            )
        last = int(number)
        if last == 1:
            story = []
        sentence, *answer = rest.split("\t")
        words = _TOKEN.findall(sentence.lower())
        if not answer:
            story = story + words
            continue
        if not story or not words or len(answer[0].split()) != 1:
            raise ExperimentError(
                f"{name}, line {place}: got {line[:60]!r}, expected a question, a tab and an answer, after a story."
            )
        yield Question(f"{name}:{place}", story, words, answer[0].strip().lower(), group)
    if not answer:
        raise ExperimentError(f"{name}: the last line is no question: the file is truncated.")


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{name}: no text in UTF-8 ({error}).") from error
