"""Speech recognition: tell what was said, without being told when."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from experiments.core.errors import ExperimentError
from experiments.core.task import Data, Example, Mean, Monitor, Stage, Task
from experiments.data.speech import Batch, FrontEnd, Labelling, SpeechData, Utterance, read_audio, warn_of_lowered
from experiments.data.speech.features import log_mel
from experiments.decoding import Decoder, Greedy, alignment
from models import AcousticModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Speech(Task):
    """Minimises −log Pr[labels | features] by connectionist temporal classification (Graves et al. 2006).

    Logged are the loss in nats per frame and, in evaluation, the errors of greedy decoding: `wer` of words and `cer` of
    characters, spaces among them, or `per` where the labels are phones. They are edits (substitutions, deletions and
    insertions) for each word, character or phone of the reference, so they can exceed 1.

    Args:
        network: factory `(X, V) -> AcousticModel` for the numbers of features and of labels.
        optimizer, halve_after, average_after: see `Task`.
        metric: what is shown, and decides which checkpoint is best. The loss still tells checkpoints apart where the
            validation is so small that several make no error in it.
        decoder: factory `(labelling) -> Decoder` of another way to decode, in the test and by `transcribe`; its errors
            are logged as `DECODER_wer` and `DECODER_cer`, with its class's name in small letters.
    """

    unit = "frames"
    examples = 3  # utterances

    def __init__(
        self,
        network: Callable[[int, int], AcousticModel],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = Adam,
        halve_after: int | None = None,
        average_after: int | None = None,
        metric: Literal["wer", "cer", "per", "loss"] = "wer",
        decoder: Callable[[Labelling], Decoder] | None = None,
    ) -> None:
        self.monitor = Monitor(metric, "min")
        super().__init__(optimizer, halve_after, average_after)
        self._build_network = network
        self.build_decoder = decoder
        self._decoder: Decoder | None = None  # what `build_decoder` gave
        self.labelling: Labelling | None = None
        self._shown: dict[str, str] = {}  # alignments of the test's first utterances, by their names

    def describe(self, data: Data | None) -> dict[str, Any]:
        if not isinstance(data, SpeechData):
            raise ExperimentError(
                f"Speech: the data are {type(data).__name__}, expected recordings, as YesNo, AN4 or Recordings."
            )
        learnt = data.learnt()
        if self.build_decoder is not None and self._decoder is None:
            # Before the training, so that one that cannot be built is not found out after it.
            self._decoder = self.build_decoder(Labelling.from_state(learnt))
        return learnt

    def imagined(self, data: Data | None, sizes: Mapping[str, int]) -> dict[str, Any]:
        if not isinstance(data, SpeechData):
            return self.describe(data)
        if "vocabulary_size" not in sizes:
            raise ExperimentError(
                "the number of labels, the blank among them, is not known without the data: give --vocabulary_size V."
            )
        return {"features": data.front_end.width, "labels": sizes["vocabulary_size"]}

    def build(self, description: dict[str, Any]) -> AcousticModel:
        if "labels" in description:  # imagined
            return self._build_network(description["features"], description["labels"])
        self.labelling = Labelling.from_state(description)
        units = self.labelling.units
        there = ("per",) if units.kind == "phones" else ("wer", "cer")
        if self.monitor.name not in (*there, "loss"):
            expected = " or ".join((*there, "loss"))
            raise ExperimentError(
                f"--model.metric: got {self.monitor.name} for labels that are {units.kind}, expected {expected}."
            )
        return self._build_network(description["features"], len(units))

    def measure(self, batch: Batch, stage: Stage) -> dict[str, Mean]:
        assert self.network is not None
        log_posteriors = self.network(batch.xs, batch.lengths)
        frames = int(batch.lengths.sum())
        loss = torch.nn.functional.ctc_loss(
            log_posteriors, batch.labels, batch.lengths, batch.label_lengths, reduction="sum"
        )
        means = {"loss": Mean(loss / frames, frames)}
        if stage == "train":
            return means
        assert self.labelling is not None
        hypotheses = Greedy(self.labelling)(log_posteriors, batch.lengths)
        means |= self._errors("", hypotheses, batch.texts, finds_words=False)
        if stage == "test":
            if self.build_decoder is not None:
                hypotheses = self.decoder(log_posteriors, batch.lengths)
                prefix = f"{type(self.decoder).__name__.lower()}_"
                means |= self._errors(prefix, hypotheses, batch.texts, self.decoder.finds_words)
            self._show(batch, hypotheses)
        return means

    @property
    def decoder(self) -> Decoder:
        """The decoder that was asked for, or a greedy one."""
        assert self.labelling is not None
        if self._decoder is None:
            self._decoder = (self.build_decoder or Greedy)(self.labelling)
        return self._decoder

    def decode_with(self, decoder: Callable[[Labelling], Decoder]) -> None:
        """Take another decoder from now on."""
        assert self.labelling is not None
        self.build_decoder, self._decoder = decoder, decoder(self.labelling)

    def _errors(self, prefix: str, hypotheses: list[str], texts: Iterable[str], finds_words: bool) -> dict[str, Mean]:
        """The error rates of a batch, each over as many words or characters as its references have."""
        from torchmetrics.functional.text import char_error_rate, word_error_rate  # slow to import

        references = [self._reference(text, finds_words) for text in texts]
        assert self.labelling is not None
        if self.labelling.units.kind == "phones" and not finds_words:
            words = sum(len(r.split()) for r in references)
            return {f"{prefix}per": _rate(word_error_rate, hypotheses, references, words)}
        return {
            f"{prefix}wer": _rate(word_error_rate, hypotheses, references, sum(len(r.split()) for r in references)),
            f"{prefix}cer": _rate(char_error_rate, hypotheses, references, sum(map(len, references))),
        }

    def _show(self, batch: Batch, hypotheses: list[str]) -> None:
        for name, text, hypothesis in zip(batch.names, batch.texts, hypotheses, strict=True):
            if name in self._shown or len(self._shown) < self.examples:
                self._shown[name] = self._alignment(name, text, hypothesis)

    def _reference(self, text: str, finds_words: bool) -> str:
        """What a decoder of words, or of labels alone, should find."""
        assert self.labelling is not None
        return text if finds_words else self.labelling.units.reference(text)

    def _alignment(self, name: str, text: str, hypothesis: str) -> str:
        """The reference over the hypothesis: of words, or of phones where the decoder gives these."""
        return alignment(name, self._reference(text, self.decoder.finds_words), hypothesis)

    def show(self) -> str:
        return "\n".join(self._shown.values())

    def transcribe(self, path: Path) -> str:
        """What is said in an audio file. Warns where its sample rate is lowered.

        Raises ExperimentError for a file that `read_audio` or `log_mel` refuses.
        """
        front_end = FrontEnd(**self.description["front_end"])
        if front_end.sample_rate is None:
            raise ExperimentError(
                f"{path}: this network hears the features that its corpus came with, and no audio. Give the checkpoint "
                "of one that was trained on recordings, as YesNo or Recordings."
            )
        audio = read_audio(path, front_end.sample_rate)
        warn_of_lowered({audio.file_rate}, front_end.sample_rate)
        [frames] = front_end.frames([log_mel(audio.samples, front_end.sample_rate, front_end.static, str(path))])
        return self.decoder(*self._posteriors(frames))[0]

    def compare(self, utterances: Iterable[Utterance]) -> str:
        """What was said over what was heard, of each utterance."""
        return "\n".join(
            self._alignment(one.name, one.text, self.decoder(*self._posteriors(one.features))[0]) for one in utterances
        )

    @torch.no_grad()
    def _posteriors(
        self,
        frames: Tensor,  # (T, X)
    ) -> tuple[Tensor, Tensor]:  # (T, 1, V) and (1,)
        assert self.network is not None
        self.network.eval()
        xs = frames.unsqueeze(1)
        return self.network(xs), torch.tensor([len(xs)])

    def pictures(self, data: Data | None) -> "dict[str, Figure]":
        """The features of the test's first utterances, and the posteriors of their labels."""
        from experiments.tasks.speech_pictures import posteriors

        assert isinstance(data, SpeechData)
        assert self.labelling is not None
        front_end = FrontEnd(**self.description["front_end"])
        figures = {}
        for number, one in enumerate(data.utterances("test")[: self.examples], start=1):
            self._shown[one.name] = self.compare([one])
            log_posteriors, _ = self._posteriors(one.features)
            probabilities = log_posteriors[:, 0].exp().cpu()
            figures[f"posteriors_{number}"] = posteriors(one, probabilities, self.labelling.units, front_end)
        return figures

    def sizes(self) -> dict[str, Any]:
        assert self.labelling is not None
        return {"features": self.description["features"], "labels": len(self.labelling.units)}

    def example(self) -> Example:
        assert isinstance(self.network, AcousticModel)
        xs = torch.zeros(3, 2, self.network.features)  # (T, B, X), of which T and B differ
        axes = {"features": {0: "T", 1: "B"}, "lengths": {0: "B"}}
        return Example((xs, torch.tensor([3, 2])), axes, ("log_posteriors",), 6)


def _rate(
    metric: Callable[[list[str], list[str]], Tensor], hypotheses: list[str], references: list[str], count: int
) -> Mean:
    return Mean(metric(hypotheses, references), count)
