"""What is said in each frame of speech."""

from collections.abc import Callable

from torch import Tensor, nn

from models.initialisation import Uniform
from models.time_major import time_major
from multint import Recurrent


class AcousticModel(nn.Module):
    """log Pr[label | frame t] = log softmax(A h_t + b), with h = recurrent(features).

    Trained by connectionist temporal classification (`torch.nn.functional.ctc_loss`), where one of the labels is the
    blank.

    Args:
        features: X, of a frame.
        labels: V, the blank among them.
        recurrent: factory `(X) -> Recurrent` of the recurrent stack, which is time-major; a bidirectional one hears
            what follows, too.
        initialise: fills the matrices anew after they are built; None leaves every part its own initialisation.

    Raises: OptionError for a stack that is `batch_first`.
    Source: Graves et al. 2006; Miao et al. 2015 for the stack of 4 bidirectional LSTMs of 320 each way.
    """

    def __init__(
        self, features: int, labels: int, recurrent: Callable[[int], Recurrent], initialise: Uniform | None = None
    ) -> None:
        super().__init__()
        self.features, self.labels = features, labels
        self.recurrent = time_major(self, recurrent(features))
        self.decoder = nn.Linear(self.recurrent.output_size, labels)
        if initialise is not None:
            initialise(self)

    def forward(
        self,
        xs: Tensor,  # (T, B, X)
        lengths: Tensor | None = None,  # (B,); T where it is None
    ) -> Tensor:  # (T, B, V)
        """The log posteriors of the labels; those past an utterance's length have no meaning."""
        h, _ = self.recurrent(xs, lengths=lengths)
        return self.decoder(h).log_softmax(-1)
