"""Multiplicative integration of any number of streams, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multint.errors import OptionError, ShapeError
from multint.integrators.checks import check_features, check_leading, positive
from multint.integrators.init import Projection, quadratic_root
from multint.integrators.terms import bias_term
from multint.integrators.vectors import add_bias, required, vector


class PairwiseTerms(NamedTuple):
    """The dense form of a map of k streams that is affine in each: the linear maps of single streams, U, and the
    bilinear ones of pairs, W:

    f(s_1 … s_k)_o = Σ_{i<j} Σ_pq s_i[p] W_ij[o,p,q] s_j[q] + Σ_i Σ_p U_i[o,p] s_i[p] + b_o.

    For the two streams (z, x) they are the W, U and V of `Terms`.
    """

    W: dict[tuple[int, int], Tensor]  # (O, F_i, F_j) for every pair i < j, counted from 0
    U: tuple[Tensor, ...]  # (O, F_i) for every stream
    b: Tensor  # (O,)

    def __call__(
        self,
        *streams: Tensor,  # (..., F_i)
    ) -> Tensor:  # (..., O)
        """Evaluate the dense form; the oracle of a test, not a fast path."""
        pairs = (torch.einsum("...p,opq,...q->...o", streams[i], W, streams[j]) for (i, j), W in self.W.items())
        return sum(pairs, self.b) + sum(s @ U.T for s, U in zip(streams, self.U, strict=True))


class Pairwise(nn.Module):
    """Multiplicative integration of k ≥ 2 streams s_1 … s_k, where an `Integrator` takes two, x and z.

    y = Σ_{i<j} α_ij ⊙ W_i s_i ⊙ W_j s_j + Σ_i β_i ⊙ W_i s_i + b.

    Each stream has one projection, shared by its k−1 pairs. For k = 2 it is `MultiplicativeIntegration`, with β in the
    order of the streams: `betas[0]` multiplies W_1 s_1 and so is that class's β2.

    Shapes: `f(*streams)`, stream i (..., features[i]) → (..., O); the leading shapes broadcast.

    Args:
        features: the streams' features, at least two.
        alpha, beta, bias: what the learnt vectors (O,) start at, the same for every pair and every stream.

    Raises: OptionError for fewer than two streams, or where it is built as an integrator of two; ShapeError for streams
    that do not fit.
    Source: Wu et al. 2016, section 2.1, on k information flows.
    """

    def __init__(
        self,
        features: Sequence[int],
        out_features: int,
        alpha: float = 1.0,
        beta: float = 1.0,
        bias: float | None = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(features, Sequence):
            raise OptionError(
                f"Pairwise: features is {features!r}, expected those of k ≥ 2 streams, as (X, Z). It does not fit "
                "where an Integrator of two streams is built; MultiplicativeIntegration is that for k = 2"
            )
        if len(features) < 2:
            raise OptionError(f"Pairwise: got {len(features)} streams (features), expected at least 2")
        self.features = tuple(positive(self, f"features[{i}]", n) for i, n in enumerate(features))
        self.out_features = positive(self, "out_features", out_features)
        self.pairs = tuple(combinations(range(len(self.features)), 2))
        self.alphas = nn.ParameterList(required(self, "alpha", alpha, out_features) for _ in self.pairs)
        self.betas = nn.ParameterList(required(self, "beta", beta, out_features) for _ in self.features)
        self.bias = vector(self, "bias", bias, out_features)
        variance = quadratic_root(alpha**2 * len(self.pairs), beta**2 * len(self.features))
        self.projections = nn.ModuleList(Projection("", n, out_features, variance) for n in self.features)

    def forward(
        self,
        *streams: Tensor,  # (..., features[i])
    ) -> Tensor:  # (..., O)
        if len(streams) != len(self.features):
            raise ShapeError(f"Pairwise: got {len(streams)} streams, expected {len(self.features)} (features)")
        for i, (stream, features) in enumerate(zip(streams, self.features, strict=True)):
            check_features(self, f"stream {i}", stream, features, f"features[{i}]")
        check_leading(self, *streams)
        projected = [project(stream) for project, stream in zip(self.projections, streams, strict=True)]
        singles = [beta.to(p.dtype) * p for beta, p in zip(self.betas, projected, strict=True)]
        products = [
            alpha.to(projected[i].dtype) * projected[i] * projected[j]
            for alpha, (i, j) in zip(self.alphas, self.pairs, strict=True)
        ]
        y = singles[0]
        for term in singles[1:] + products:
            y = y + term
        return add_bias(y, self.bias)

    def terms(self) -> PairwiseTerms:
        """The dense form, differentiable with respect to the parameters: for study, not for speed."""
        matrices: list[Tensor] = [part.weight for part in self.projections]  # type: ignore[misc]
        return PairwiseTerms(
            W={
                (i, j): torch.einsum("o,op,oq->opq", alpha, matrices[i], matrices[j])
                for alpha, (i, j) in zip(self.alphas, self.pairs, strict=True)
            },
            U=tuple(beta[:, None] * matrix for beta, matrix in zip(self.betas, matrices, strict=True)),
            b=bias_term(self.bias, matrices[0]),
        )

    def extra_repr(self) -> str:
        return f"{self.features}, {self.out_features}"
