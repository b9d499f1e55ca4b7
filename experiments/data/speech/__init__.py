"""Speech: recordings with transcripts, as features and labels."""

from experiments.data.speech.an4 import AN4
from experiments.data.speech.audio import read_audio, warn_of_lowered
from experiments.data.speech.batches import Batch, Utterance
from experiments.data.speech.features import FrontEnd
from experiments.data.speech.labelling import Labelling
from experiments.data.speech.recordings import Recordings, YesNo
from experiments.data.speech.speech_data import SpeechData
from experiments.data.speech.units import Units

__all__ = [
    "AN4",
    "Batch",
    "FrontEnd",
    "Labelling",
    "Recordings",
    "SpeechData",
    "Units",
    "Utterance",
    "YesNo",
    "read_audio",
    "warn_of_lowered",
]
