"""The likeliest words by a decoding graph."""

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.speech import Labelling
from experiments.decoding.decoder import BeamSearch
from experiments.decoding.graph import INSTALL, Topology, decoding_graph, words_of
from experiments.decoding.ngram import NGram


class WFST(BeamSearch):
    """The words on the likeliest path of a decoding graph, with an n-gram model of the training's transcripts.

    A path costs −log of the n-gram model's probability, and in each frame
    −acoustic_scale · (log Pr[label | frame] − prior_scale · log Pr[label]). The prior of a label is its share of the
    training's labels, with blanks between and around them; one that is not there counts as seen once.

    Args:
        labelling: see `Decoder`; its lexicon has the words.
        order: of the n-gram model.
        topology: of the graph; see `decoding_graph`.
        acoustic_scale: what a frame's score weighs against the language model.
        prior_scale: how much of the prior is taken off.
        beam: how much worse than the best one a path may be on its way and still be followed.

    Raises ExperimentError for a scale or a beam out of range, and without the libraries (extra `decoding`).
    Source: Miao et al. 2015.
    """

    wider = "beam"

    def __init__(
        self,
        labelling: Labelling,
        order: int = 3,
        topology: Topology = "strict",
        acoustic_scale: float = 1.0,
        prior_scale: float = 1.0,
        beam: float = 16.0,
    ) -> None:
        super().__init__(labelling)
        for name, value in {"acoustic_scale": acoustic_scale, "beam": beam}.items():
            if not 0 < value < float("inf"):
                raise ExperimentError(f"WFST: {name} is {value}, expected a number above 0.")
        if not 0 <= prior_scale <= 1:
            raise ExperimentError(f"WFST: prior_scale is {prior_scale}, expected 0 to 1.")
        try:
            import kaldi_decoder
        except ImportError as error:
            raise ExperimentError(f"WFST: decoding graphs are searched by kaldi-decoder: {INSTALL}") from error
        self._words = words_of(self.units)
        model = NGram(labelling.transcripts, self._words, order)
        self._graph = decoding_graph(self.units, model.arpa(), topology)
        counts = torch.tensor(labelling.counts, dtype=torch.float32).clamp(min=1)
        self._shift = prior_scale * (counts / counts.sum()).log()
        self._scale = acoustic_scale
        self._options = kaldi_decoder.FasterDecoderOptions(beam=beam, min_active=0)

    def scores(self, log_posteriors: Tensor) -> Tensor:
        return self._scale * (log_posteriors - self._shift)

    def best(self, scores: Tensor) -> tuple[str, bool]:
        import kaldi_decoder
        import kaldifst

        search = kaldi_decoder.FasterDecoder(self._graph, self._options)
        search.decode(kaldi_decoder.DecodableCtc(scores.numpy()))
        is_there, path = search.get_best_path()
        if not is_there:
            return "", False
        _, _, words, _ = kaldifst.get_linear_symbol_sequence(path)
        return " ".join(self._words[word - 1] for word in words), search.reached_final()
