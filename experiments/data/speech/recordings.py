"""Recordings of a user's own, and those of the smallest public corpus."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pooch
import torch

from experiments.core.errors import ExperimentError
from experiments.data.archives import read_archive
from experiments.data.downloads import KnownFile
from experiments.data.speech.audio import read_audio, warn_of_lowered
from experiments.data.speech.features import FrontEnd, Normalise, log_mel
from experiments.data.speech.manifests import SPLITS, Row, read_manifest, rows_by_name, words_of
from experiments.data.speech.speech_data import Recording, SpeechData
from experiments.data.speech.units import Kind


class Recordings(SpeechData):
    """WAV and FLAC files with transcripts, as log energies of mel bands.

    Where a manifest names no splits, some are held out for validation and test: whole speakers where it names them,
    the same ones in every run.

    Args:
        path: a manifest (CSV with a header, or JSON lines; see `read_manifest`), or a folder of files whose names hold
            their words, as `yes_no_no.wav`.
        unit: what a label is.
        words: what the parts of such names stand for, as `{"1": "YES", "0": "NO"}`; None: they are the words.
        lexicon: a file of lines WORD PHONE PHONE …, for `unit: phones`; the words in it are those that are known.
        sample_rate: samples per second. Files with more are lowered to it, and those with less are refused.
        mels: bands, 40, or 23 for 8000 samples per second.
        deltas, normalise, stack: see `FrontEnd`.
        valid, test: the fractions held out.
        batch_frames, seed: see `SpeechData`.

    Raises ExperimentError without `soundfile` and `kaldi-native-fbank` (extra `speech`).
    """

    def __init__(
        self,
        path: str,
        unit: Kind = "characters",
        words: dict[str, str] | None = None,
        lexicon: str | None = None,
        sample_rate: int = 16_000,
        mels: int = 40,
        deltas: bool = True,
        normalise: Normalise = "utterance",
        stack: int = 3,
        valid: float = 0.1,
        test: float = 0.1,
        batch_frames: int = 2000,
        seed: int | None = None,
    ) -> None:
        super().__init__(FrontEnd(sample_rate, mels, deltas, normalise, stack), unit, lexicon, batch_frames, seed)
        if not (valid > 0 and test > 0 and valid + test < 1):
            raise ExperimentError(
                f"--data.valid, --data.test: got {valid} and {test}, expected fractions above 0 whose sum is below 1."
            )
        self.path, self.words = Path(path).expanduser(), words
        self.held_out = {"valid": valid, "test": test}

    def _recordings(self) -> dict[str, list[Recording]]:
        rows = rows_by_name(self.path, self.words) if self.path.is_dir() else read_manifest(self.path)
        splits = _splits(rows, self.held_out, self.path)
        sets: dict[str, list[Recording]] = {split: [] for split in SPLITS}
        for split, recording in zip(splits, self._read(rows), strict=True):
            sets[split].append(recording)
        return sets

    def _read(self, rows: Sequence[Row], contents: Mapping[Path, bytes] | None = None) -> list[Recording]:
        """The features of every file; the contents are those of an archive."""
        sample_rate, mels = self.front_end.sample_rate, self.front_end.static
        assert sample_rate is not None
        recordings, rates = [], set()
        for row in rows:
            audio = read_audio(row.path, sample_rate, None if contents is None else contents[row.path])
            rates.add(audio.file_rate)
            static = log_mel(audio.samples, sample_rate, mels, str(row.path))
            # Files of two folders may have one name.
            recordings.append(Recording(row.path.name, row.speaker or str(row.path), static, row.text))
        warn_of_lowered(rates, sample_rate)
        return recordings


class YesNo(Recordings):
    """60 recordings of one man who says eight words each, "yes" or "no", at 8000 samples per second.

    The split is that of public recipes: sorted by name, every second one, from the first on, is for training, and the
    others are the test. Of the 30 for training, the 8th and the 23rd are held out for validation.

    Args:
        root: the folder in which `yesno` lies, with the files or as an archive; where it is not there, it is
            downloaded. None: the user's cache folder for multint.
        unit: what a label is.
        mels, deltas, normalise, stack: see `FrontEnd`.
        batch_frames, seed: see `SpeechData`.

    Source: https://www.openslr.org/1
    """

    def __init__(
        self,
        root: str | None = None,
        unit: Kind = "words",
        mels: int = 23,
        deltas: bool = True,
        normalise: Normalise = "utterance",
        stack: int = 3,
        batch_frames: int = 1000,
        seed: int | None = None,
    ) -> None:
        self.root = Path(root).expanduser() if root is not None else Path(pooch.os_cache("multint"))
        super().__init__(
            str(self.root),
            unit,
            {"1": "YES", "0": "NO"},
            None,
            8000,
            mels,
            deltas,
            normalise,
            stack,
            batch_frames=batch_frames,
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Downloads the recordings if they are not on disk. Raises ExperimentError where that fails."""
        if self._folder() is None and self._archive() is None:
            ARCHIVE.fetch(self.root)

    def _recordings(self) -> dict[str, list[Recording]]:
        if (folder := self._folder()) is not None:
            rows, contents = rows_by_name(folder, self.words), None
        else:
            archive = self._archive() or ARCHIVE.fetch(self.root)
            contents = {Path(name): content for name, content in read_archive(archive).items() if name.endswith(".wav")}
            rows = [Row(path, words_of(path, self.words)) for path in contents]
        if len(rows) != _YESNO:
            raise ExperimentError(
                f"{self.root}: yesno has {len(rows)} files there, expected {_YESNO}: the split goes by their order. "
                "Put all of them there, or remove the folder to have it downloaded."
            )
        recordings = self._read(sorted(rows, key=lambda row: row.path.name), contents)
        train, test = recordings[::2], recordings[1::2]
        return {
            "train": [one for i, one in enumerate(train) if i % 15 != 7],
            "valid": train[7::15],
            "test": test,
        }

    def _folder(self) -> Path | None:
        folders = [self.root / "yesno", self.root / "yesno" / "waves_yesno", self.root / "waves_yesno"]
        return next((folder for folder in folders if any(folder.glob("*.wav"))), None)

    def _archive(self) -> Path | None:
        found = [path for folder in (self.root / "yesno", self.root) for path in folder.glob("*yesno.tar.*")]
        return ARCHIVE.find(self.root) or next((path for path in found if path.suffix != ".part"), None)


_YESNO = 60
ARCHIVE = KnownFile(
    "yesno",
    "waves_yesno.tar.gz",
    "sha256:c3f49e0cca421f96b75b41640749167b52118f232498667ca7a5f9416aef8e73",
    "https://www.openslr.org/resources/1/waves_yesno.tar.gz",
)


def _splits(rows: Sequence[Row], held_out: Mapping[str, float], path: Path) -> list[str]:
    """The split of each row: that which it names or, where none does, drawn for whole speakers or for rows."""
    named = [row.split for row in rows if row.split is not None]
    if len(named) == len(rows):
        return named
    if named:
        raise ExperimentError(f"{path}: {len(named)} of {len(rows)} rows name a split, expected all or none.")
    groups = [row.speaker or f"row {number}" for number, row in enumerate(rows)]
    distinct = list(dict.fromkeys(groups))
    counts = [max(1, round(held_out[split] * len(distinct))) for split in ("valid", "test")]
    if sum(counts) >= len(distinct):
        raise ExperimentError(
            f"{path}: {len(distinct)} speakers, or recordings without one, expected at least {sum(counts) + 1}: "
            f"{sum(counts)} are held out. Name each row's split, or leave the speakers out."
        )
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0)).tolist()
    names = ["valid"] * counts[0] + ["test"] * counts[1] + ["train"] * (len(distinct) - sum(counts))
    split_of = {distinct[i]: name for i, name in zip(order, names, strict=True)}
    return [split_of[group] for group in groups]
