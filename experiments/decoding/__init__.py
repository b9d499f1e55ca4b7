"""From log posteriors to text."""

from experiments.decoding.alignment import align, alignment
from experiments.decoding.decoder import Decoder
from experiments.decoding.greedy import Greedy

__all__ = ["Decoder", "Greedy", "align", "alignment"]
