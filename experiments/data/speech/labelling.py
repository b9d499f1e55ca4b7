"""What the training's transcripts say of labels and words, for those who decode."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.data.speech.units import BLANK, Units


class Labelling(NamedTuple):
    """The units, how often each label is expected in training, and its transcripts."""

    units: Units
    counts: list[int]  # of each label, V, with blanks between the labels and around them
    transcripts: list[str]

    @classmethod
    def of(cls, units: Units, labels: Sequence[Sequence[int]], transcripts: Sequence[str]) -> "Labelling":
        """From the labels of all transcripts. The prior of a label is its share of the counts (Miao et al. 2015)."""
        counts = [0] * len(units)
        for sequence in labels:
            counts[BLANK] += len(sequence) + 1
            for label in sequence:
                counts[label] += 1
        return cls(units, counts, list(transcripts))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, of which `from_state` makes the same."""
        return {
            "units": self.units.state_dict(),
            "label_counts": self.counts,
            "transcripts": self.transcripts,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Labelling":
        return cls(Units.from_state(state["units"]), state["label_counts"], state["transcripts"])
