"""A language model: symbols in, the next symbol's logits out."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.initialisation import Uniform
from models.time_major import time_major
from multint import Integrator, Recurrent
from multint.errors import OptionError, ShapeError
from multint.integrators import build
from multint.integrators.checks import flag, probability
from multint.recurrent.masks import locked_mask

Factory = Callable[[int, int, int], Integrator]


class Features(NamedTuple):
    """What a language model makes of symbols, before the softmax."""

    softmax: Tensor  # (T, B, O): what the softmax reads
    recurrent: Tensor  # (T, B, H): what the recurrent stack gave, dropped out
    undropped: Tensor  # (T, B, H): the same before dropout
    state: Any  # the stack's, after the last step


class LanguageModel(nn.Module):
    """The next symbol's logits from a recurrent stack, and from a context c at both of its ends.

        e_t = E[symbol_t]                  c_t = relu(W_c e_t + b_c)
        x_t = encoder(e_t, c_t)            or e_t
        h_t = recurrent(x_1 … x_t)
        o_t = output(h_t, c_t)             or W_o h_t + b_o, or h_t
        logits_t = A o_t + b

    With `output=Bilinear` it is the LSTM + MultDec of Jayakumar et al., and with `encoder=Bilinear` too their
    LSTM + MultEncDec. Their integrators are any of the algebra.

    Args:
        vocabulary_size: V, the number of symbols.
        recurrent: factory `(X) -> Recurrent` of the recurrent stack.
        embedding_size: X, the features of a symbol's learnt vector; None feeds one-hot vectors, X = V, as Wu et al. do:
            the integrator's own input matrix is the embedding then.
        encoder: factory `(X, C, X) -> Integrator` of what the stack reads; None: the embedding itself.
        output: factory `(H, C, O) -> Integrator` of the output embedding, which the softmax reads; None: a linear map
            where an `output_size` is given, else the stack's output itself.
        output_size: O. None: X if tied and there is an `output`, else H.
        context_size: C, the features of the context.
        context: what the output embedding's context is made of: the symbol's embedding e_t, or the stack's output h_t.
            The encoder's is always made of e_t: there is no h_t yet.
        dropout: probability of dropping each feature of what the stack reads and of its output.
        locked: one mask for all steps, instead of one for each (Gal and Ghahramani 2016).
        word_dropout: probability of dropping a symbol's whole vector, wherever it stands (Merity et al. 2018).
        tied: A is the embedding's matrix (Press and Wolf 2017).
        initialise: fills the matrices anew after they are built; None leaves every part its own initialisation.

    Raises: ShapeError for tied weights and for parts of other sizes, OptionError for settings out of range and for a
    stack that is bidirectional, which would read the symbols that it predicts, or `batch_first`.
    Source: Jayakumar et al. 2020, section 5 (language modelling).
    """

    def __init__(
        self,
        vocabulary_size: int,
        recurrent: Callable[[int], Recurrent],
        embedding_size: int | None = 128,
        encoder: Factory | None = None,
        output: Factory | None = None,
        output_size: int | None = None,
        context_size: int = 32,
        context: Literal["input", "state"] = "input",
        dropout: float = 0.0,
        locked: bool = False,
        word_dropout: float = 0.0,
        tied: bool = False,
        initialise: Uniform | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(
            vocabulary_size=vocabulary_size,
            embedding_size=embedding_size,
            output_size=output_size,
            context_size=context_size,
        )
        if context not in ("input", "state"):
            raise OptionError(f"LanguageModel: context is {context!r}, expected 'input' or 'state'")
        self.vocabulary_size = vocabulary_size
        self.dropout = probability(self, "dropout", dropout)
        self.word_dropout = probability(self, "word_dropout", word_dropout)
        self.locked = flag(self, "locked", locked)
        symbol = vocabulary_size if embedding_size is None else embedding_size  # X
        self.embedding = nn.Embedding(vocabulary_size, symbol) if embedding_size is not None else None
        self.encoder = build(self, "encoder", encoder, symbol, context_size, symbol) if encoder is not None else None
        self.recurrent = time_major(self, recurrent(symbol))
        _check_stack(self.recurrent, symbol)
        hidden = self.recurrent.output_size  # H
        features = output_size or (symbol if tied and output is not None else hidden)  # O
        self.output = build(self, "output", output, hidden, context_size, features) if output is not None else None
        is_projected = output is None and output_size is not None
        self.projection = nn.Linear(hidden, features) if is_projected else None
        of_input = encoder is not None or (output is not None and context == "input")
        self.input_context = nn.Linear(symbol, context_size) if of_input else None
        of_state = output is not None and context == "state"
        self.state_context = nn.Linear(hidden, context_size) if of_state else None
        self.decoder = nn.Linear(features, vocabulary_size)
        if flag(self, "tied", tied):
            self._tie(embedding_size, features)
        if initialise is not None:
            initialise(self)

    def forward(
        self,
        tokens: Tensor,  # (T, B) int64
        state: Any = None,  # the recurrent stack's state
    ) -> tuple[Tensor, Any]:
        """The logits of every next symbol, (T, B, V), and the state after the last one."""
        features = self.features(tokens, state)
        return self.decoder(features.softmax), features.state

    def features(
        self,
        tokens: Tensor,  # (T, B) int64
        state: Any = None,  # the recurrent stack's state
    ) -> Features:
        """All but the softmax: for a loss that never holds the logits of all symbols at once."""
        e = self._dropped(self._embedded(tokens))
        c = self.input_context(e).relu() if self.input_context is not None else None
        x = e if self.encoder is None else self.encoder(e, c)
        undropped, state = self.recurrent(x, state)
        h = self._dropped(undropped)
        if self.state_context is not None:
            c = self.state_context(h).relu()
        if self.output is not None:
            return Features(self.output(h, c), h, undropped, state)
        return Features(h if self.projection is None else self.projection(h), h, undropped, state)

    def restarted(
        self,
        state: Any,  # the recurrent stack's
        streams: Tensor,  # (B,) bool
    ) -> Any:
        """The state with the initial one in those of the streams."""
        fields = (state,) if isinstance(state, Tensor) else tuple(state)
        starts = zip(*self.recurrent.initial_states(len(streams)), strict=True)  # by field, of each layer
        mixed = [
            torch.where(streams.view(1, -1, *[1] * (old.ndim - 2)), torch.stack(start), old)
            for start, old in zip(starts, fields, strict=True)
        ]
        return mixed[0] if isinstance(state, Tensor) else tuple(mixed)

    def _embedded(self, tokens: Tensor) -> Tensor:
        if self.embedding is None:
            e = nn.functional.one_hot(tokens, self.vocabulary_size).to(self.decoder.weight.dtype)
        else:
            e = self.embedding(tokens)
        if self.word_dropout and self.training:
            of_words = locked_mask(e.new_empty(self.vocabulary_size), self.word_dropout)
            e = e * of_words[tokens].unsqueeze(-1)
        return e

    def _dropped(
        self,
        values: Tensor,  # (T, B, ·)
    ) -> Tensor:
        if not (self.dropout and self.training):
            return values
        if self.locked:
            return values * locked_mask(values[:1], self.dropout)
        return nn.functional.dropout(values, self.dropout)

    def _tie(self, embedding_size: int | None, features: int) -> None:
        if self.embedding is None:
            raise OptionError("LanguageModel: tied weights without an embedding: give an embedding_size")
        if embedding_size != features:
            raise ShapeError(
                f"LanguageModel: tied weights with embedding_size {embedding_size} and {features} features before the "
                f"softmax, expected equal sizes: set output_size to {embedding_size} or embedding_size to {features}, "
                "or project the output (proj_size of the LSTM cell)"
            )
        # Logits of unit variance to begin with: `nn.Embedding`'s own normal numbers give them that of the features.
        nn.init.normal_(self.embedding.weight, std=features**-0.5)
        self.decoder.weight = self.embedding.weight


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            remedy = ", or null for one-hot vectors" if name == "embedding_size" else ""
            raise OptionError(f"LanguageModel: {name} is {size}, expected at least 1{remedy}")


def _check_stack(recurrent: Recurrent, symbol: int) -> None:
    if recurrent.input_size != symbol:
        raise ShapeError(
            f"LanguageModel: recurrent reads {recurrent.input_size} features, expected {symbol}, those of a symbol: "
            "its factory is called with them"
        )
    if recurrent.bidirectional:
        raise OptionError(
            "LanguageModel: recurrent.bidirectional is true, expected false: its backward direction reads the symbols "
            "to predict"
        )
