"""The likeliest text by prefix beam search."""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.speech import Labelling
from experiments.data.speech.units import BLANK
from experiments.decoding.decoder import BeamSearch
from experiments.decoding.graph import INSTALL
from experiments.decoding.ngram import NGram
from experiments.decoding.quiet import quiet

_ORDERS = range(2, 7)  # that KenLM has, as it is built for the library
_THRESHOLD = 50.0  # nats by which a prefix may be worse than the best one: `beam_width` is what limits
_IMPOSSIBLE = -1e6


class PrefixBeam(BeamSearch):
    """The text with the highest Pr[text | features] · P(text)^lm_weight, P by an n-gram model of the training's texts.

    Unlike in `WFST`, the probabilities of all paths to a text are added up, and there are no priors.

    Args:
        labelling: see `Decoder`; its labels are characters or words, and its lexicon has the words.
        order: of the n-gram model, 2 to 6.
        lm_weight: what the n-gram model weighs.
        beam_width: prefixes that are followed.

    Raises ExperimentError for a setting out of range, for labels that are phones, and without `flashlight-text` (extra
    `decoding`).
    Source: Hannun et al. 2014, with the lexicon as a trie by Collobert et al. 2016.
    """

    wider = "beam_width"

    def __init__(
        self,
        labelling: Labelling,
        order: int = 3,
        lm_weight: float = 1.0,
        beam_width: int = 100,
    ) -> None:
        super().__init__(labelling)
        if order not in _ORDERS:
            raise ExperimentError(f"PrefixBeam: order is {order}, expected {_ORDERS[0]} to {_ORDERS[-1]}.")
        if not 0 <= lm_weight < math.inf:
            raise ExperimentError(f"PrefixBeam: lm_weight is {lm_weight}, expected a number of at least 0.")
        if beam_width < 1:
            raise ExperimentError(f"PrefixBeam: beam_width is {beam_width}, expected at least 1.")
        if self.units.kind == "phones":
            raise ExperimentError("PrefixBeam: the labels are phones, expected characters or words. Use WFST for them.")
        try:
            from flashlight.lib.text import decoder
        except ImportError as error:
            raise ExperimentError(
                f"PrefixBeam: it is run by flashlight-text, which has wheels up to Python 3.12: {INSTALL}"
            ) from error
        V = len(self.units)
        limits = {"beam_size": beam_width, "beam_size_token": V, "beam_threshold": _THRESHOLD}
        # The library multiplies logarithms to the base 10.
        weights = {"lm_weight": lm_weight * math.log(10), "sil_score": 0.0, "log_add": True}
        self._words = sorted(self.units.lexicon)
        arpa = NGram(labelling.transcripts, self._words, order).arpa()
        ctc = decoder.CriterionType.CTC
        self._space: int | None = None  # the label that ends a word
        if self.units.kind == "words":
            # A word is a label: the model scores labels.
            self._words = ["<unk>", *self.units.symbols]  # the blank is no word
            options = decoder.LexiconFreeDecoderOptions(**limits, **weights, criterion_type=ctc)
            self._search = decoder.LexiconFreeDecoder(options, _kenlm(arpa, self._words), BLANK, BLANK, [])
        else:
            model = _kenlm(arpa, self._words)
            # Without a space among the labels one is added that no frame has: texts are single words.
            self._space = self.units.symbols.index(" ") + 1 if " " in self.units.symbols else V
            options = decoder.LexiconDecoderOptions(
                **limits, **weights, word_score=0.0, unk_score=-math.inf, criterion_type=ctc
            )
            trie = self._trie(model, max(V, self._space + 1))
            self._search = decoder.LexiconDecoder(options, trie, model, self._space, BLANK, -1, [], False)

    def scores(self, log_posteriors: Tensor) -> Tensor:
        return log_posteriors

    def best(self, scores: Tensor) -> tuple[str, bool]:
        if self._space is not None:
            # The library knows that a word is over by the space after it: there is one more frame, which has it.
            width = max(scores.shape[1], self._space + 1)
            padded = scores.new_full((len(scores) + 1, width), _IMPOSSIBLE)
            padded[:-1, : scores.shape[1]] = scores
            padded[-1, self._space] = 0.0
            scores = padded
        best = self._search.decode(scores.data_ptr(), *scores.shape)[0]
        if self._space is None:
            labels = torch.tensor(best.tokens).unique_consecutive().tolist()
            return " ".join(self._words[label] for label in labels if label != BLANK), True
        return " ".join(self._words[word] for word in best.words if word >= 0), best.score > _IMPOSSIBLE / 2

    def _trie(self, model: Any, labels: int) -> Any:
        """The lexicon, each word with a space behind it, and what the model says of it at a sentence's start."""
        from flashlight.lib.text import decoder

        trie = decoder.Trie(labels, self._space)
        start = model.start(False)
        for number, word in enumerate(self._words):
            _, score = model.score(start, number)
            for one in self.units.labels_of(word):
                trie.insert([*one, self._space], number, score)
        trie.smear(decoder.SmearingMode.MAX)
        return trie


def _kenlm(arpa: str, words: list[str]) -> Any:
    """The model, for words by their places in the list."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.arpa"
        path.write_text(arpa, encoding="utf-8")
        with quiet():
            return KenLM(str(path), Dictionary(words))
