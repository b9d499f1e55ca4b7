"""The answer to a question on a document, read by attention."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.initialisation import Uniform
from models.time_major import last_output, time_major
from multint import Additive, BiAffine, Integrator, Recurrent
from multint.errors import OptionError
from multint.integrators.base import build
from multint.integrators.checks import positive, probability


class Answer(NamedTuple):
    """What a reader makes of a batch."""

    logits: Tensor  # (B, A), of the answers
    weights: Tensor  # (T, B), of the document's words; those of a document sum to 1


class AttentiveReader(nn.Module):
    """logits = A g + b with g = tanh(join(r, q)), where r = Σ_t s_t d_t is what was read of the document.

    d_t is a recurrent network's output at the document's word t, and q another one's at the end of the query: that of
    its last word and, of a bidirectional one, that of its first word read backwards, side by side. The weights are
    s = softmax over t of vᵀ tanh(attention(d_t, q)) or, where `attention_size` is None, of attention(d_t, q), a single
    number: with `Bilinear` that is qᵀ W d_t.

    Args:
        words: V, of documents and queries.
        answers: A.
        recurrent: factory `(X) -> Recurrent` of the recurrent stack of the document, and of another of the query.
            Both are time-major.
        embedding_size: E, of a word.
        attention: factory `(X, Z, O) -> Integrator` of how a document's word meets the query.
        attention_size: M, what it gives to tanh; None: it gives the score itself.
        join: factory of how what was read meets the query.
        join_size: G, of g; None: as many as d_t has.
        dropout: of the embeddings, and of g.
        initialise: fills the matrices anew after they are built; None leaves every part its own initialisation.

    Raises: OptionError for an attention that gives the score itself as a sum of both, so that the weights would not
    depend on the query, and for stacks that are `batch_first`.
    Source: Hermann et al. 2015, section 3, where both integrators are `Additive`; Chen et al. 2016 for the bilinear
    attention without tanh.
    """

    def __init__(
        self,
        words: int,
        answers: int,
        recurrent: Callable[[int], Recurrent],
        embedding_size: int = 64,
        attention: Callable[[int, int, int], Integrator] = Additive,
        attention_size: int | None = 64,
        join: Callable[[int, int, int], Integrator] = Additive,
        join_size: int | None = None,
        dropout: float = 0.0,
        initialise: Uniform | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(positive(self, "words", words), positive(self, "embedding_size", embedding_size))
        self.document, self.query = (time_major(self, recurrent(embedding_size)) for _ in range(2))
        size = self.document.output_size
        outputs = 1 if attention_size is None else positive(self, "attention_size", attention_size)
        self.attention = build(self, "attention", attention, size, size, outputs)
        if attention_size is None:
            _refuse_a_sum(self.attention)
        self.score = None if attention_size is None else nn.Linear(attention_size, 1, bias=False)
        self.join = build(self, "join", join, size, size, size if join_size is None else join_size)
        self.dropout = probability(self, "dropout", dropout)
        self.decoder = nn.Linear(self.join.out_features, positive(self, "answers", answers))
        if initialise is not None:
            initialise(self)

    def forward(
        self,
        documents: Tensor,  # (T, B) int64
        lengths: Tensor,  # (B,), each at least 1
        queries: Tensor,  # (L, B) int64
        query_lengths: Tensor,  # (B,), each at least 1
    ) -> Answer:
        """Read a batch. What stands past a length has no influence."""
        d, _ = self.document(self._embedded(documents), lengths=lengths)  # (T, B, D)
        q = last_output(self.query, self._embedded(queries), query_lengths)  # (B, D)
        scores = self.attention(d, q)
        if self.score is not None:
            scores = self.score(scores.tanh())
        steps = torch.arange(documents.shape[0], device=documents.device).unsqueeze(1)
        weights = scores.squeeze(-1).masked_fill(steps >= lengths, -torch.inf).softmax(0)
        read = torch.einsum("tb,tbd->bd", weights, d)
        g = self.join(read, q).tanh()
        return Answer(self.decoder(nn.functional.dropout(g, self.dropout, self.training)), weights)

    def _embedded(
        self,
        words: Tensor,  # (T, B)
    ) -> Tensor:  # (T, B, E)
        return nn.functional.dropout(self.embedding(words), self.dropout, self.training)


def _refuse_a_sum(attention: Integrator) -> None:
    """Raise an OptionError for f(d, q) = Vd + Uq + b, of which the softmax over d leaves out all but Vd."""
    if isinstance(attention, BiAffine):
        W = attention.terms().W
        if not (W.requires_grad or W.is_meta or W.any()):
            raise OptionError(
                f"AttentiveReader: {type(attention).__name__} gives the score as a sum of what document and query "
                "give, so the weights would not depend on the query. Give attention_size, or an attention that "
                "multiplies, as Bilinear"
            )
