"""The sLSTM: an LSTM whose gates are exponentials, kept from overflowing by a running maximum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multint.cells.base import Cell
from multint.integrators import Integrator, MultiplicativeIntegration
from multint.integrators.base import build


class SLSTMState(NamedTuple):
    """The output, the memory, the normaliser, and the logarithm that both are scaled by."""

    h: Tensor  # (B, H)
    c: Tensor  # (B, H)
    n: Tensor  # (B, H)
    m: Tensor  # (B, H)


class SLSTMCell(Cell):
    """h' = σ(o) ⊙ c' / n', where c' = σ(f) ⊙ c + eⁱ ⊙ tanh(g), n' = σ(f) ⊙ n + eⁱ and (i, f, g, o) = gates(x, h).

    h' is a weighted mean of all that came in, so that a late input may outweigh every earlier one. c and n are kept as
    c e⁻ᵐ and n e⁻ᵐ with m' = max(m + log σ(f), i), which leaves the quotient as it is: nothing overflows.

    Args:
        integrator: factory `(X, H, 4H) -> Integrator` of the gates.

    Raises: OptionError for sizes below 1.
    Source: Beck et al. 2024 (xLSTM), eqs. 8 to 17, with one head and the sigmoid for f.
    """

    gate_names = ("i", "f", "g", "o")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.gates = build(self, "integrator", integrator, input_size, hidden_size, len(self.gate_names) * hidden_size)

    def step(
        self,
        x: Tensor,  # (B, X)
        state: SLSTMState,
    ) -> SLSTMState:
        i, f, g, o = self.gates(x, state.h).chunk(len(self.gate_names), -1)
        kept = state.m + nn.functional.logsigmoid(f)
        m = torch.maximum(kept, i)
        old, new = (kept - m).exp(), (i - m).exp()
        c = old * state.c + new * g.tanh()
        n = old * state.n + new
        return SLSTMState((o.sigmoid() * c / n).to(o.dtype), c, n, m)

    def initial_state(self, batch_size: int) -> SLSTMState:
        """All zeros but m, which is so low that the first step keeps nothing."""
        zeros = self.zeros(batch_size, self.hidden_size)
        lowest = torch.full_like(zeros, torch.finfo(zeros.dtype).min / 2)
        return SLSTMState(zeros, zeros, zeros, lowest)
