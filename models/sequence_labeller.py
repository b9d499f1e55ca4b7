"""A label for every symbol of a sequence, from what was read until there."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from models.time_major import time_major
from multint import Recurrent


class SequenceLabeller(nn.Module):
    """logits_t = A h_t + b with h = recurrent(x) and x_t = √S·onehot(symbol_t), of unit second moment.

    Args:
        symbols: S, the number of symbols.
        labels: Q, the number of labels.
        recurrent: factory `(S) -> Recurrent` of the recurrent stack, which is time-major.

    Raises: OptionError for one that is `batch_first`.
    """

    def __init__(self, symbols: int, labels: int, recurrent: Callable[[int], Recurrent]) -> None:
        super().__init__()
        self.symbols = symbols
        self.recurrent = time_major(self, recurrent(symbols))
        self.decoder = nn.Linear(self.recurrent.output_size, labels)

    def forward(
        self,
        symbols: Tensor,  # (T, B) int64
    ) -> Tensor:  # (T, B, Q)
        """The logits of the label after every symbol."""
        x = math.sqrt(self.symbols) * nn.functional.one_hot(symbols, self.symbols)
        h, _ = self.recurrent(x.to(self.decoder.weight.dtype))
        return self.decoder(h)
