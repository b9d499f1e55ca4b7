"""What the data of all recognisers share: utterances with transcripts, as batches of features and labels."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.buckets import BucketedData, Buckets
from experiments.data.speech.batches import Batch, Utterance, collated
from experiments.data.speech.features import FrontEnd
from experiments.data.speech.labelling import Labelling
from experiments.data.speech.units import Kind, Lexicon, Units, read_lexicon


class Recording(NamedTuple):
    """What was recorded once, before the features that the network reads are made."""

    name: str
    speaker: str
    static: Tensor  # (T, F)
    text: str  # one space between words


class SpeechData(BucketedData):
    """Utterances with transcripts, in batches of like lengths.

    A subclass gives `_recordings`. All features are kept in memory: of 40 bands with slopes, 173 MB for an hour.

    Args:
        front_end: how features are made.
        unit: what a label is.
        lexicon: a file of pronunciations, for phones; the words in it are those that are known.
        batch_frames: frames in a batch, padding included, after `stack`.
        seed: of the order in training; None takes the run's.

    Raises ExperimentError at construction for a setting out of range, and in `setup` for recordings that cannot be
    used.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        unit: Kind,
        lexicon: str | None,
        batch_frames: int,
        seed: int | None,
    ) -> None:
        if batch_frames < 1:
            raise ExperimentError(f"--data.batch_frames: got {batch_frames}, expected at least 1.")
        super().__init__(seed)
        self.front_end, self.unit, self.lexicon, self.batch_frames = front_end, unit, lexicon, batch_frames
        self._labelling: Labelling | None = None
        self._sets: dict[str, list[Utterance]] = {}  # by split

    @abstractmethod
    def _recordings(self) -> Mapping[str, Sequence[Recording]]:
        """Those of "train", "valid" and "test". Raises ExperimentError where they cannot be used."""

    def _lexicon(self) -> Lexicon | None:
        return None if self.lexicon is None else read_lexicon(Path(self.lexicon).expanduser())

    def learnt(self) -> dict[str, Any]:
        """What a network and a decoder must know of the data, as plain values; available after `setup`."""
        assert self._labelling is not None
        front_end = vars(self.front_end)
        return {"features": self.front_end.width, "front_end": dict(front_end), **self._labelling.state_dict()}

    def utterances(self, split: str) -> list[Utterance]:
        """Those of "train", "valid" or "test"; available after `setup`."""
        return self._sets[split]

    def setup(self, stage: str | None = None) -> None:
        """Reads the recordings, once for all stages. Raises ExperimentError where they cannot be used."""
        super().setup(stage)
        if self._sets:
            return
        recordings = self._recordings()
        for split in ("train", "valid", "test"):
            if not recordings[split]:
                raise ExperimentError(f"{type(self).__name__}: there are no recordings for the split '{split}'.")
        units = Units.of(self.unit, (one.text for one in recordings["train"]), self._lexicon())
        sets = {split: _utterances(of_split, units, self.front_end) for split, of_split in recordings.items()}
        train = sets["train"]
        self._labelling = Labelling.of(units, [one.labels for one in train], [one.text for one in train])
        self._sets = sets

    def _buckets(self, split: str) -> Buckets:
        return Buckets([len(one.features) for one in self._sets[split]], self.batch_frames)

    def _batch(self, split: str, chosen: Sequence[int], generator: torch.Generator) -> Batch:
        return collated([self._sets[split][i] for i in chosen])


def _utterances(recordings: Sequence[Recording], units: Units, front_end: FrontEnd) -> list[Utterance]:
    """The recordings in their order, as features and labels."""
    frames: dict[int, Tensor] = {}
    of_speakers: dict[str, list[int]] = {}
    for index, recording in enumerate(recordings):
        of_speakers.setdefault(recording.speaker, []).append(index)
    for indices in of_speakers.values():
        frames |= zip(indices, front_end.frames([recordings[i].static for i in indices]), strict=True)
    utterances = []
    for index, recording in enumerate(recordings):
        labels = units.encode(recording.text, recording.name)
        _check_length(recording.name, labels, len(frames[index]))
        utterances.append(Utterance(recording.name, frames[index], labels, recording.text))
    return utterances


def _check_length(name: str, labels: list[int], frames: int) -> None:
    """Raise ExperimentError where CTC has no path: each label takes a frame, and a blank between two equal ones."""
    needed = len(labels) + sum(a == b for a, b in pairwise(labels))
    if needed > frames:
        raise ExperimentError(
            f"{name}: its {len(labels)} labels take {needed} frames, and it has {frames}. Lower --data.stack, correct "
            "the transcript, or leave the recording out."
        )
