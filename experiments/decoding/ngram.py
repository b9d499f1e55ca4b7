"""N-gram language models of the training's transcripts, in the format of ARPA."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from experiments.core.errors import ExperimentError

START, END = "<s>", "</s>"
_RESERVED = {START, END, "<unk>", "<eps>", "#0"}  # what n-gram files and graphs mean by them is no word
_NEVER = -99  # log₁₀ of the probability of `<s>`, by ARPA's custom


class NGram:
    """P(w | h) = (c(h w) + t(h) P(w | h')) / (c(h) + t(h)), by Witten and Bell's smoothing.

    c counts in the sentences, each between `<s>` and `</s>`; t(h) is how many different words follow the history h
    there; h' is h without its oldest word. The empty history's h' gives every word, and `</s>`, the same probability.

    Args:
        sentences: with spaces between words.
        words: all there are; those of the sentences must be among them.
        order: N; a history is the last N − 1 words.

    Raises ExperimentError for an order below 1, for no sentences, and for a word that is unknown or cannot be one.
    Source: Witten and Bell 1991, interpolated as in Chen and Goodman 1998.
    """

    def __init__(self, sentences: Iterable[str], words: Iterable[str], order: int) -> None:
        if order < 1:
            raise ExperimentError(f"order: got {order}, expected at least 1.")
        self.order, self.words = order, sorted(set(words))
        if refused := _RESERVED.intersection(self.words):
            raise ExperimentError(f"{min(refused)} is no word: n-gram models have another meaning for it. Rename it.")
        self._events = {*self.words, END}
        self._counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)  # of what follows each history
        for sentence in sentences:
            for word, history in self._steps(sentence):
                for length in range(len(history) + 1):
                    self._counts[history[len(history) - length :]][word] += 1
        if not self._counts:
            raise ExperimentError("an n-gram model needs sentences, got none.")

    def probability(
        self,
        word: str,
        history: Sequence[str] = (),  # from `<s>` on, or the last words alone
    ) -> float:
        """P(word | history). The word is one of `words`, or `</s>`."""
        kept = tuple(history[max(0, len(history) - self.order + 1) :])
        shorter = self.probability(word, kept[1:]) if kept else 1 / len(self._events)
        if kept not in self._counts:
            return shorter
        seen = self._counts[kept]
        return (seen[word] + len(seen) * shorter) / (seen.total() + len(seen))

    def perplexity(self, sentences: Iterable[str]) -> float:
        """The exponential of the mean −log P of every word and `</s>`."""
        logs = [math.log(self.probability(*step)) for sentence in sentences for step in self._steps(sentence)]
        return math.exp(-sum(logs) / len(logs))

    def arpa(self) -> str:
        """The model as ARPA's file: an n-gram that was not seen has its shorter one's, times the history's back-off.

        That back-off is t(h) / (c(h) + t(h)), with which the smoothing above is exact.
        """
        grams: list[list[tuple[str, ...]]] = [[(START,), *((word,) for word in sorted(self._events))]]
        for length in range(1, self.order):
            histories = sorted(history for history in self._counts if len(history) == length)
            grams.append([(*history, word) for history in histories for word in sorted(self._counts[history])])
        lines = ["\\data\\", *(f"ngram {n}={len(of_length)}" for n, of_length in enumerate(grams, start=1))]
        for n, of_length in enumerate(grams, start=1):
            lines += ["", f"\\{n}-grams:", *map(self._line, of_length)]
        return "\n".join([*lines, "", "\\end\\", ""])

    def _line(self, gram: tuple[str, ...]) -> str:
        log = _NEVER if gram == (START,) else math.log10(self.probability(gram[-1], gram[:-1]))
        line = f"{log:.7f}\t{' '.join(gram)}"
        if len(gram) < self.order and gram in self._counts:
            seen = self._counts[gram]
            line += f"\t{math.log10(len(seen) / (seen.total() + len(seen))):.7f}"
        return line

    def _steps(self, sentence: str) -> list[tuple[str, tuple[str, ...]]]:
        """Each word of a sentence and its end, with the history before it."""
        if unknown := set(sentence.split()) - self._events:
            raise ExperimentError(f"'{min(unknown)}' is not one of the n-gram model's {len(self.words)} words.")
        words = (START, *sentence.split(), END)
        return [(words[i], words[max(0, i - self.order + 1) : i]) for i in range(1, len(words))]
