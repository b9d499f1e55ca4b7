"""Long short-term memory with any integrator for its gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multint.cells.base import Cell
from multint.errors import OptionError
from multint.integrators import Integrator, MultiplicativeIntegration
from multint.integrators.base import build
from multint.integrators.checks import flag, number, whole
from multint.integrators.normalised import normalisation


class LSTMState(NamedTuple):
    """The output and the memory."""

    h: Tensor  # (B, H), or (B, P) with a projection
    c: Tensor  # (B, H)


class LSTMCell(Cell):
    """c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g), h' = σ(o) ⊙ tanh(c'), where (i, f, g, o) = gates(x, h).

    Gates are in PyTorch's order. Under autocast the memory c keeps its dtype, and h has the products' one.

    Args:
        integrator: factory `(X, H, 4H) -> Integrator` of the gates.
        peepholes: add p_i ⊙ c to i, p_f ⊙ c to f and p_o ⊙ c' to o, with learnt vectors that start at 0.
        forget_bias: a constant added to f.
        proj_size: P > 0 makes h' = R(σ(o) ⊙ tanh(c')) with a learnt R (P, H), as `nn.LSTM` does.
        memory_norm: factory `(H) -> module` of a norm of c' where h' reads it, such as `torch.nn.LayerNorm` or
            `RecurrentBatchNorm`; None for none. The gates are normalised by their integrator, `Normalised` (Ba et al.
            2016 do both, and Cooijmans et al. 2016).

    Raises: OptionError for a proj_size that is not in 0 … H−1.
    Source: Wu et al. 2016, A.1; Gers and Schmidhuber 2000 for the peepholes; Sak et al. 2014 for the projection.
    """

    gate_names = ("i", "f", "g", "o")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
        peepholes: bool = False,
        forget_bias: float = 0.0,
        proj_size: int = 0,
        memory_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        if whole(self, "proj_size", proj_size, 0) >= hidden_size:
            raise OptionError(f"LSTMCell: proj_size is {proj_size}, expected 0 (none) to {hidden_size - 1}")
        self.output_size = proj_size or hidden_size
        self.forget_bias = number(self, "forget_bias", forget_bias)
        width = len(self.gate_names) * hidden_size
        self.gates = build(self, "integrator", integrator, input_size, self.output_size, width)
        has_peepholes = flag(self, "peepholes", peepholes)
        self.peepholes = nn.Parameter(torch.zeros(3, hidden_size)) if has_peepholes else None  # to i, f and o
        self.projection = nn.Linear(hidden_size, proj_size, bias=False) if proj_size else None
        self.memory_norm: nn.Module | None = None
        if memory_norm is not None:
            self.memory_norm = normalisation(self, "memory_norm", memory_norm, hidden_size)

    def step(
        self,
        x: Tensor,  # (B, X)
        state: LSTMState,
    ) -> LSTMState:
        i, f, g, o = self.gates(x, state.h).chunk(len(self.gate_names), -1)
        dtype = o.dtype
        if self.peepholes is not None:
            i, f = i + self.peepholes[0] * state.c, f + self.peepholes[1] * state.c
        if self.forget_bias:
            f = f + self.forget_bias
        c = f.sigmoid() * state.c + i.sigmoid() * g.tanh()
        if self.peepholes is not None:
            o = o + self.peepholes[2] * c
        read = c if self.memory_norm is None else self.memory_norm(c)
        h = (o.sigmoid() * read.tanh()).to(dtype)
        return LSTMState(h if self.projection is None else self.projection(h), c)

    def initial_state(self, batch_size: int) -> LSTMState:
        return LSTMState(self.zeros(batch_size, self.output_size), self.zeros(batch_size, self.hidden_size))
