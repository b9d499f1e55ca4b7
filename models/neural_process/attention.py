"""Attention over a set that may be padded, or empty."""

import torch
from torch import Tensor, nn

from multint.errors import OptionError
from multint.integrators.checks import positive


class Attention(nn.Module):
    """a = LN(Qq + softmax(Qq (Kk)ᵀ / √F) Vv) by heads, then LN(a + relu(Aa + b)).

    Where a set has no points, what they would add is 0. The scores are divided by √F of all heads, as published.

    Raises: OptionError for a number below 1, and unless the features share out evenly among the heads.
    Source: Lee et al. 2019 (Set Transformer), equations 6 and 7.
    """

    def __init__(self, in_features: int, out_features: int, heads: int) -> None:
        super().__init__()
        positive(self, "out_features", out_features)
        if out_features % positive(self, "heads", heads):
            raise OptionError(f"Attention: {out_features} features among {heads} heads, expected a divisor of them")
        self.heads = heads
        self.query = nn.Linear(in_features, out_features, bias=False)
        self.key = nn.Linear(in_features, out_features, bias=False)
        self.value = nn.Linear(in_features, out_features, bias=False)
        self.output = nn.Linear(out_features, out_features)
        self.first_norm, self.second_norm = nn.LayerNorm(out_features), nn.LayerNorm(out_features)

    def forward(
        self,
        queries: Tensor,  # (B, N, X)
        keys: Tensor,  # (B, C, X)
        values: Tensor,  # (B, C, X)
        mask: Tensor | None = None,  # (B, C) bool
    ) -> Tensor:  # (B, N, F)
        q = self.query(queries)
        read = self._read(q, self.key(keys), self.value(values), mask) if keys.shape[1] else 0
        a = self.first_norm(q + read)
        return self.second_norm(a + self.output(a).relu())

    def _read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        allowed = None if mask is None else (mask | ~mask.any(-1, keepdim=True))[:, None, None]  # softmax needs one
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        read = nn.functional.scaled_dot_product_attention(*heads, attn_mask=allowed, scale=q.shape[-1] ** -0.5)
        read = read.transpose(1, 2).flatten(-2)
        return read if mask is None else torch.where(mask.any(-1)[:, None, None], read, 0)
