"""What a recogniser hears of a waveform: frames of features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.speech.audio import INSTALL

Normalise = Literal["utterance", "speaker", "none"]

_WINDOW_MS, _SHIFT_MS = 25, 10
_FULL_SCALE = 2**15  # Kaldi's features are of samples as 16-bit numbers


@dataclass(frozen=True)
class FrontEnd:
    """How the features of a frame are made.

    Args:
        sample_rate: samples per second of the waveforms; None where features are given instead.
        static: features of a frame before all that follows: log energies of mel bands, or those that are given.
        deltas: append their slopes over time, and the slopes of these: three times as many features.
        normalise: take from each feature its mean, and divide it by its deviation, both of the utterance or of all
            utterances of a speaker.
        stack: join so many frames into one, which makes the sequences shorter.

    Raises ExperimentError for a size below 1.
    """

    sample_rate: int | None = 16_000
    static: int = 40
    deltas: bool = True
    normalise: Normalise = "utterance"
    stack: int = 1

    def __post_init__(self) -> None:
        for name, size in {"sample_rate": self.sample_rate, "mels": self.static, "stack": self.stack}.items():
            if size is not None and size < 1:
                raise ExperimentError(f"--data.{name}: got {size}, expected at least 1.")

    @property
    def width(self) -> int:
        """Features X of a frame that the network reads."""
        return self.static * (3 if self.deltas else 1) * self.stack

    def frames(
        self,
        statics: Sequence[Tensor],  # (T, F) each, of one speaker
    ) -> list[Tensor]:  # (⌈T / stack⌉, X) each
        """What the network reads of several utterances, from their static features."""
        features = [with_deltas(static) if self.deltas else static for static in statics]
        if self.normalise == "utterance":
            features = [normalised([one])[0] for one in features]
        elif self.normalise == "speaker":
            features = normalised(features)
        return [stacked(one, self.stack) for one in features]


def log_mel(
    wave: Tensor,  # (N,) in [−1, 1]
    sample_rate: int,
    mels: int,
    name: str,  # of the file, for messages
) -> Tensor:  # (T, mels)
    """Log energies of mel bands in windows of 25 ms, each 10 ms after the one before, as Kaldi has them.

    Raises ExperimentError without `kaldi-native-fbank`, for more bands than the sample rate has room for, and for a
    waveform that is shorter than a window.
    """
    try:
        import kaldi_native_fbank
    except ImportError as error:
        raise ExperimentError(f"features are made by kaldi-native-fbank: {INSTALL}") from error
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = sample_rate
    options.frame_opts.frame_length_ms, options.frame_opts.frame_shift_ms = _WINDOW_MS, _SHIFT_MS
    options.frame_opts.dither = 0.0  # no random numbers
    options.mel_opts.num_bins = mels
    try:
        bank = kaldi_native_fbank.OnlineFbank(options)
    except ValueError as error:
        raise ExperimentError(
            f"--data.mels, --data.sample_rate: there are no {mels} bands in {sample_rate} samples per second ({error})."
        ) from error
    bank.accept_waveform(sample_rate, (wave * _FULL_SCALE).numpy())
    bank.input_finished()
    if not bank.num_frames_ready:
        raise ExperimentError(f"{name}: it lasts {1000 * len(wave) / sample_rate:.0f} ms, expected {_WINDOW_MS} ms.")
    return torch.stack([torch.from_numpy(bank.get_frame(t).copy()) for t in range(bank.num_frames_ready)])


def with_deltas(
    frames: Tensor,  # (T, F)
) -> Tensor:  # (T, 3 F)
    """The features, their slopes Δ and the slopes of these.

    Δ_t = Σ_n n (x_{t+n} − x_{t−n}) / (2 Σ_n n²) for n = 1, 2, the line of least squares through five frames; beyond
    both ends the outermost frame goes on.
    """
    slopes = _slope(frames)
    return torch.cat([frames, slopes, _slope(slopes)], dim=1)


def _slope(frames: Tensor) -> Tensor:
    index = torch.arange(len(frames))
    slope = torch.zeros_like(frames)
    for n in (1, 2):
        later, earlier = (index + n).clamp(max=len(frames) - 1), (index - n).clamp(min=0)
        slope += n / 10 * (frames[later] - frames[earlier])
    return slope


def normalised(
    utterances: Sequence[Tensor],  # (T, X) each
) -> list[Tensor]:
    """Every feature less its mean over all frames of the utterances, divided by its deviation."""
    whole = torch.cat(list(utterances))
    mean, std = whole.mean(0), whole.std(0, correction=0)
    # A feature that never changes is 0, and not its rounding error magnified.
    scale = torch.where(std > 1e-5 * whole.abs().amax(0), std, torch.inf)
    return [(frames - mean) / scale for frames in utterances]


def stacked(
    frames: Tensor,  # (T, X)
    count: int,
) -> Tensor:  # (⌈T / count⌉, count · X)
    """So many frames in a row as one; the last frame is repeated to fill the last one."""
    missing = -len(frames) % count
    return torch.cat([frames, frames[-1:].expand(missing, -1)]).reshape(-1, count * frames.shape[1])
