"""Audio files as waveforms of one sample rate."""

import io
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError

INSTALL = 'pip install -c constraints.txt -e ".[speech]"'

# What programs that write into a pipe give as the size of what they do not know yet.
_UNKNOWN_SIZE = 2**31 - 2**16


class Audio(NamedTuple):
    """A waveform of one channel."""

    samples: Tensor  # (N,) in [−1, 1]
    file_rate: int  # samples per second in the file; those here have the rate that was asked for


def read_audio(path: Path, sample_rate: int, content: bytes | None = None) -> Audio:
    """The waveform of a WAV or FLAC file, or of any other that libsndfile reads.

    Several channels are averaged, and a higher sample rate is lowered to the one asked for.

    Args:
        content: of the file, where it is a part of an archive; the path is then what messages call it.

    Raises ExperimentError without `soundfile`, for a file that is missing, empty, truncated or no audio, whose samples
    are no finite numbers, or whose sample rate is too low: nothing can give back the frequencies that it lacks.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ExperimentError(f"audio files are read by soundfile: {INSTALL}") from error
    if content is None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExperimentError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not content:
        raise ExperimentError(f"{path}: the file is empty, expected audio.")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            samples, rate, notes = file.read(dtype="float32", always_2d=True), file.samplerate, file.extra_info
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(error).rpartition(": ")[2].rstrip(".")
        raise ExperimentError(f"{path}: no audio file, or a truncated one ({reason}). Expected WAV or FLAC.") from error
    _check_whole(path, notes)
    wave = torch.from_numpy(samples).mean(1)
    if not len(wave):
        raise ExperimentError(f"{path}: it has no samples, expected some speech.")
    if not wave.isfinite().all():
        raise ExperimentError(f"{path}: some samples are no finite numbers. Leave the file out.")
    if rate < sample_rate:
        raise ExperimentError(
            f"{path}: it has {rate} samples per second, expected at least {sample_rate}. Lower --data.sample_rate for "
            "all files, or leave this one out."
        )
    return Audio(_lowered(wave, rate, sample_rate), rate)


def warn_of_lowered(rates: Iterable[int], sample_rate: int) -> None:
    """Tell the sample rates of files that were lowered to the one asked for."""
    if lowered := sorted({*rates} - {sample_rate}):
        warnings.warn(
            f"files with {' and '.join(map(str, lowered))} samples per second were lowered to {sample_rate}.",
            stacklevel=3,
        )


def _check_whole(path: Path, notes: str) -> None:
    """Raise ExperimentError for a WAV file that is shorter than it says: libsndfile notes that, and reads the rest."""
    for told, there in re.findall(r"^data\s*:\s*(\d+) \(should be (\d+)\)", notes, re.MULTILINE):
        if int(there) < int(told) < _UNKNOWN_SIZE:
            raise ExperimentError(f"{path}: truncated: {there} bytes of audio, expected {told}, as its header says.")


def _lowered(wave: Tensor, rate: int, sample_rate: int) -> Tensor:
    """The waveform with a lower sample rate, without the frequencies that this cannot hold."""
    if rate == sample_rate:
        return wave
    from scipy.signal import resample_poly

    divisor = math.gcd(rate, sample_rate)
    return torch.from_numpy(resample_poly(wave.numpy(), sample_rate // divisor, rate // divisor))
