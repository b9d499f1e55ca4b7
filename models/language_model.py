"""A language model: symbols in, the next symbol's logits out."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from models.initialisation import Uniform
from multint import Recurrent
from multint.errors import OptionError, ShapeError


class LanguageModel(nn.Module):
    """logits_t = A h_t + b, (h, state) = recurrent(E[tokens], state).

    Args:
        vocabulary_size: V, the number of symbols.
        recurrent: factory `(X) -> Recurrent` of the recurrent stack.
        embedding_size: X, the features of a symbol's learnt vector; None feeds one-hot vectors, X = V, as Wu et al. do:
            the integrator's own input matrix is the embedding then.
        dropout: probability of dropping each feature of the embedding and of the recurrent output.
        tied: A is the embedding's matrix (Press and Wolf 2017).
        initialise: fills the matrices anew after they are built; None leaves every part its own initialisation.

    Raises: ShapeError for tied weights that differ in size, OptionError for settings out of range and for a stack that
    is bidirectional, which would read the symbols that it predicts, or `batch_first`.
    """

    def __init__(
        self,
        vocabulary_size: int,
        recurrent: Callable[[int], Recurrent],
        embedding_size: int | None = 128,
        dropout: float = 0.0,
        tied: bool = False,
        initialise: Uniform | None = None,
    ) -> None:
        super().__init__()
        _check(embedding_size, dropout)
        self.vocabulary_size = vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size, embedding_size) if embedding_size is not None else None
        self.recurrent = recurrent(vocabulary_size if embedding_size is None else embedding_size)
        _check_stack(self.recurrent)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(self.recurrent.output_size, vocabulary_size)
        if tied:
            self._tie(embedding_size)
        if initialise is not None:
            initialise(self)

    def forward(
        self,
        tokens: Tensor,  # (T, B) int64
        state: Any = None,  # the recurrent layer's state
    ) -> tuple[Tensor, Any]:
        """The logits of every next symbol, (T, B, V), and the state after the last one."""
        if self.embedding is None:
            x = nn.functional.one_hot(tokens, self.vocabulary_size).to(self.decoder.weight.dtype)
        else:
            x = self.dropout(self.embedding(tokens))
        output, state = self.recurrent(x, state)
        return self.decoder(self.dropout(output)), state

    def _tie(self, embedding_size: int | None) -> None:
        if self.embedding is None or embedding_size != self.recurrent.output_size:
            raise ShapeError(
                f"LanguageModel: tied weights with embedding_size {embedding_size} and a recurrent output of "
                f"{self.recurrent.output_size} features, expected equal sizes: set embedding_size to "
                f"{self.recurrent.output_size}, or project the output (proj_size of the LSTM cell)"
            )
        self.decoder.weight = self.embedding.weight


def _check(embedding_size: int | None, dropout: float) -> None:
    if embedding_size is not None and embedding_size < 1:
        raise OptionError(
            f"LanguageModel: embedding_size is {embedding_size}, expected at least 1, or null for one-hot vectors"
        )
    if not 0 <= dropout < 1:
        raise OptionError(f"LanguageModel: dropout is {dropout}, expected a probability in [0, 1)")


def _check_stack(recurrent: Recurrent) -> None:
    reasons = {
        "bidirectional": "its backward direction reads the symbols to predict",
        "batch_first": "the tokens are time-major, (T, B)",
    }
    for name, reason in reasons.items():
        if getattr(recurrent, name):
            raise OptionError(f"LanguageModel: recurrent.{name} is true, expected false: {reason}")
