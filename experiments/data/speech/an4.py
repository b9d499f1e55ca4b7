"""CMU's census database AN4: addresses, names and numbers, spelled or said, as the features that it comes with."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.archives import read_archive
from experiments.data.speech.features import FrontEnd, Normalise
from experiments.data.speech.speech_data import Recording, SpeechData
from experiments.data.speech.units import Kind, Lexicon, one_spaced, read_lexicon

_STATIC = 13
_HELD_OUT = slice(4, None, 9)  # 8 of the 74 speakers, in alphabetical order, which puts women before men

Read = Callable[[str], bytes]  # what lies at a path in the corpus


class AN4(SpeechData):
    """948 utterances of 74 speakers to train on, 130 of 10 others to test, as 13 cepstra at 100 frames per second.

    Eight of the training's speakers are held out for validation; the corpus has no such set of its own. The words are
    those of its pronunciation dictionary. There are no waveforms: a recogniser of these features cannot `transcribe`.

    Args:
        root: the folder in which `an4` lies, with `etc` and `feat`, or as `an4.tar.xz`, or that folder itself.
        unit: what a label is. Phones are the 34 of the dictionary.
        deltas, normalise, stack: see `FrontEnd`.
        batch_frames, seed: see `SpeechData`.

    Source: Acero 1993; http://www.speech.cs.cmu.edu/databases/an4
    """

    def __init__(
        self,
        root: str,
        unit: Kind = "characters",
        deltas: bool = True,
        normalise: Normalise = "speaker",
        stack: int = 3,
        batch_frames: int = 2000,
        seed: int | None = None,
    ) -> None:
        super().__init__(FrontEnd(None, _STATIC, deltas, normalise, stack), unit, None, batch_frames, seed)
        self.root = Path(root).expanduser()
        self._dictionary: Lexicon | None = None

    def _lexicon(self) -> Lexicon | None:
        return self._dictionary

    def _recordings(self) -> dict[str, list[Recording]]:
        read = _reader(self.root)
        dictionary = "etc/an4.dic"
        self._dictionary = read_lexicon(Path(dictionary), _text(read, dictionary))
        train, test = (self._of(read, split) for split in ("train", "test"))
        held_out = set(sorted({one.speaker for one in train})[_HELD_OUT])
        return {
            "train": [one for one in train if one.speaker not in held_out],
            "valid": [one for one in train if one.speaker in held_out],
            "test": test,
        }

    def _of(self, read: Read, split: str) -> list[Recording]:
        transcripts = {}
        for line in _text(read, f"etc/an4_{split}.transcription").splitlines():
            if (match := re.fullmatch(r"(.*)\((\S+)\)\s*", line)) is None:
                raise ExperimentError(f"an4_{split}.transcription: got {line!r}, expected WORDS (UTTERANCE).")
            transcripts[match[2]] = one_spaced(match[1])
        recordings = []
        for line in _text(read, f"etc/an4_{split}.fileids").split():
            path = PurePosixPath(line)
            if path.name not in transcripts:
                raise ExperimentError(f"an4_{split}.transcription: it has no transcript of {path.name}.")
            name = f"feat/{path}.mfc"
            recordings.append(
                Recording(path.name, path.parent.name, _cepstra(read(name), name), transcripts[path.name])
            )
        return recordings


def _reader(root: Path) -> Read:
    """Reads the corpus below the folder, unpacked or not."""
    for folder in (root / "an4", root):
        if (folder / "etc").is_dir() and (folder / "feat").is_dir():
            return partial(_read_below, folder)
        for archive in sorted(folder.glob("an4*.tar*")):
            return _archive(archive)
    raise ExperimentError(
        f"{root}: AN4 does not lie there, expected an4/etc and an4/feat, or an4/an4.tar.xz. Say by --data.root where."
    )


def _archive(path: Path) -> Read:
    files = read_archive(path)

    def read(name: str) -> bytes:
        if name not in files:
            raise ExperimentError(f"{path}: it has no {name}. Expected the archive of AN4 with cepstra.")
        return files[name]

    return read


def _read_below(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ExperimentError(f"{folder / name}: cannot be read: {error.strerror or error}.") from error


def _text(read: Read, name: str) -> str:
    try:
        return read(name).decode()
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{name}: no text in UTF-8 ({error}).") from error


def _cepstra(content: bytes, name: str) -> Tensor:
    """The frames (T, 13) of a file: their number of values, then these, all of four bytes, the highest first."""
    values = int.from_bytes(content[:4], "big")
    if not values or values % _STATIC or len(content) != 4 * (values + 1):
        raise ExperimentError(
            f"{name}: {len(content)} bytes, expected {4 * (values + 1)} by its first number, of frames of {_STATIC} "
            "values: empty, truncated or of another kind."
        )
    frames = torch.frombuffer(bytearray(content[4:]), dtype=torch.uint8).view(-1, 4).flip(1).contiguous()
    cepstra = frames.view(torch.float32).view(-1, _STATIC)
    if not cepstra.isfinite().all():
        raise ExperimentError(f"{name}: some values are no finite numbers: damaged, or of another byte order.")
    return cepstra
