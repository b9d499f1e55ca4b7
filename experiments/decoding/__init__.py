"""From log posteriors to text."""

from experiments.decoding.alignment import align, alignment
from experiments.decoding.decoder import Decoder
from experiments.decoding.greedy import Greedy
from experiments.decoding.ngram import NGram
from experiments.decoding.prefix_beam import PrefixBeam
from experiments.decoding.wfst import WFST

__all__ = ["Decoder", "Greedy", "NGram", "PrefixBeam", "WFST", "align", "alignment"]
