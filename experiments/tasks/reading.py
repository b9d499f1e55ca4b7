"""Reading: answer a question on a document."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from experiments.core.errors import ExperimentError
from experiments.core.task import Data, Example, Mean, Monitor, Stage, Task
from experiments.data.reading import Batch, ReadingData, Wording
from models import AttentiveReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORDS = 5  # of a document, those that it was read by most


class Reading(Task):
    """Minimises −log Pr[answer | document, query], in nats per question; `accuracy` is the share that is right.

    In the test, accuracies that need no network stand beside it. `maximum_frequency`: the answer that is most often in
    the document; `exclusive_frequency`: of those that are not in the query (Hermann et al. 2015, section 4.1);
    `commonest_answer`: that of the training, where answers are words. `answerable` is the share of questions whose
    answer is in the document. Where the questions are of several groups, as the tasks of bAbI, each has its
    `accuracy_GROUP`.

    Args:
        network: factory `(V, A) -> AttentiveReader` for the numbers of words and of answers.
        optimizer, halve_after, average_after: see `Task`.
        metric: what is shown, and decides which checkpoint is best.
    """

    unit = "questions"
    examples = 3  # questions

    def __init__(
        self,
        network: Callable[[int, int], AttentiveReader],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
        average_after: int | None = None,
        metric: Literal["accuracy", "loss"] = "accuracy",
    ) -> None:
        self.monitor = Monitor(metric, "max" if metric == "accuracy" else "min")
        super().__init__(optimizer, halve_after, average_after)
        self._build_network = network
        self.wording: Wording | None = None
        self._shown: dict[str, str] = {}  # the test's first questions, by their names

    def describe(self, data: Data | None) -> dict[str, Any]:
        if not isinstance(data, ReadingData):
            raise ExperimentError(
                f"Reading: the data are {type(data).__name__}, expected questions, as BAbI, NovelCloze or "
                "QuestionFiles."
            )
        return data.wording.state_dict()

    def imagined(self, data: Data | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        if not sizes.keys() >= {"vocabulary_size", "answers"}:
            raise ExperimentError(
                "the numbers of words and of answers are not known without the data: give --vocabulary_size V and "
                "--answers A."
            )
        return {"sizes": [sizes["vocabulary_size"], sizes["answers"]]}

    def build(self, description: dict[str, Any]) -> AttentiveReader:
        if "sizes" in description:  # imagined
            return self._build_network(*description["sizes"])
        self.wording = Wording.from_state(description)
        self._answer_of_word = self.wording.numbers_of_answers()
        return self._build_network(len(self.wording.words), len(self.wording.answers))

    def measure(self, batch: Batch, stage: Stage) -> dict[str, Mean]:
        assert self.network is not None
        logits, weights = self.network(batch.documents, batch.lengths, batch.queries, batch.query_lengths)
        count = len(batch.answers)
        means = {"loss": Mean(torch.nn.functional.cross_entropy(logits, batch.answers), count)}
        chosen = logits.detach().argmax(-1)
        right = self._right(chosen, batch)
        means["accuracy"] = _share(right)
        if stage == "test":
            means |= self._by_frequency(batch)
            for group in sorted(set(batch.groups) - {""}):
                of_group = torch.tensor([one == group for one in batch.groups], device=right.device)
                means[f"accuracy_{group}"] = _share(right[of_group])
            self._show(batch, chosen, weights)
        return means

    def _right(self, chosen: Tensor, batch: Batch) -> Tensor:  # (B,) bool
        """Of answers that are words, the first is for those that the training has not: it is never right."""
        right = chosen == batch.answers
        return right if self._wording.markers else right & (batch.answers != 0)

    @property
    def _wording(self) -> Wording:
        assert self.wording is not None
        return self.wording

    def _by_frequency(self, batch: Batch) -> dict[str, Mean]:
        """What needs no network; of answers that are as frequent, the first is taken."""
        in_document, in_query = (self._counts(words) for words in (batch.documents, batch.queries))
        unasked = in_document.masked_fill(in_query > 0, -1)
        means = {
            "maximum_frequency": _share(self._right(in_document.argmax(-1), batch)),
            "exclusive_frequency": _share(self._right(unasked.argmax(-1), batch)),
            "answerable": _share(in_document.gather(1, batch.answers.unsqueeze(1)) > 0),
        }
        if not self._wording.markers:
            means["commonest_answer"] = _share(batch.answers == 1)
        return means

    def _counts(
        self,
        words: Tensor,  # (T, B)
    ) -> Tensor:  # (B, A)
        """How often each answer stands there. Padding is no answer: it is the number of `<unk>`."""
        answers = self._answer_of_word.to(words.device)[words]  # (T, B)
        counts = torch.zeros(words.shape[1], len(self._wording.answers), dtype=torch.long, device=words.device)
        return counts.scatter_add_(1, answers.clamp(min=0).T, (answers >= 0).long().T)

    def _show(self, batch: Batch, chosen: Tensor, weights: Tensor) -> None:
        for b, name in enumerate(batch.names):
            if name in self._shown or len(self._shown) < self.examples:
                self._shown[name] = self._told(batch, b, int(chosen[b]), weights[:, b])

    def _told(self, batch: Batch, b: int, chosen: int, weights: Tensor) -> str:
        query = self._text(batch.queries[: batch.query_lengths[b], b])
        document = self._text(batch.documents[: batch.lengths[b], b])
        best = weights[: len(document)].topk(min(_WORDS, len(document)))
        places = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        read = ", ".join(f"{document[i]} {weight:.2f}" for i, weight in places)
        answer = self._wording.answers[int(batch.answers[b])]
        return f"{batch.names[b]}: {' '.join(query)}\n  {self._wording.answers[chosen]}, expected {answer}; by {read}"

    def _text(self, words: Tensor) -> list[str]:
        return [self._wording.words[i] for i in words.tolist()]

    def show(self) -> str:
        return "\n".join(self._shown.values())

    @torch.no_grad()
    def pictures(self, data: Data | None) -> "dict[str, Figure]":
        """The first questions of the test, each with the weights of its document's words."""
        from experiments.tasks.reading_pictures import attention

        assert isinstance(data, ReadingData)
        assert self.network is not None
        self.network.eval()
        figures = {}
        for number, batch in enumerate(data.singly("test", self.examples), start=1):
            logits, weights = self.network(batch.documents, batch.lengths, batch.queries, batch.query_lengths)
            document, query = self._text(batch.documents[:, 0]), self._text(batch.queries[:, 0])
            chosen, answer = (self._wording.answers[int(i)] for i in (logits[0].argmax(), batch.answers[0]))
            title = f"{' '.join(query)}\n{chosen}, expected {answer}"
            figures[f"attention_{number}"] = attention(document, weights[:, 0], title)
            self._shown[batch.names[0]] = self._told(batch, 0, int(logits[0].argmax()), weights[:, 0])
        return figures

    def sizes(self) -> dict[str, Any]:
        return {"words": len(self._wording.words), "answers": len(self._wording.answers)}

    def example(self) -> Example:
        words, lengths = torch.zeros(3, 2, dtype=torch.long), torch.tensor([3, 2])
        axes = {"documents": {0: "T", 1: "B"}, "lengths": {0: "B"}, "queries": {0: "L", 1: "B"}}
        axes |= {"query_lengths": {0: "B"}}
        return Example((words, lengths, words.clone(), lengths.clone()), axes, ("logits", "weights"), 2)


def _share(right: Tensor) -> Mean:
    return Mean(right.float().mean(), right.numel())
