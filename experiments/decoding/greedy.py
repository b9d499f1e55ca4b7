"""The likeliest label of every frame."""

from torch import Tensor

from experiments.data.speech.units import BLANK
from experiments.decoding.decoder import Decoder


class Greedy(Decoder):
    """The likeliest path: of every frame its likeliest label, equal neighbours once, and without blanks."""

    finds_words = False

    def __call__(self, log_posteriors: Tensor, lengths: Tensor) -> list[str]:
        paths = log_posteriors.argmax(-1).T.cpu()
        texts = []
        for path, length in zip(paths, lengths.tolist(), strict=True):
            labels = path[:length].unique_consecutive().tolist()
            texts.append(self.units.decode(label for label in labels if label != BLANK))
        return texts
