"""What a sequence comes to: outputs at its last steps."""

from collections.abc import Callable

from torch import Tensor, nn

from models.time_major import time_major
from multint import Recurrent


class SequenceReader(nn.Module):
    """y_t = A h_t + b at the last steps of a sequence, with h = recurrent(x).

    Args:
        inputs: X, the features of the sequence.
        outputs: O.
        recurrent: factory `(X) -> Recurrent` of the recurrent stack, which is time-major.

    Raises: OptionError for one that is `batch_first`.
    """

    def __init__(self, inputs: int, outputs: int, recurrent: Callable[[int], Recurrent]) -> None:
        super().__init__()
        self.recurrent = time_major(self, recurrent(inputs))
        self.decoder = nn.Linear(self.recurrent.output_size, outputs)

    def forward(
        self,
        xs: Tensor,  # (T, B, X)
        last: int = 1,  # R
    ) -> Tensor:  # (R, B, O)
        """The outputs at the last R steps."""
        h, _ = self.recurrent(xs)
        return self.decoder(h[-last:])
