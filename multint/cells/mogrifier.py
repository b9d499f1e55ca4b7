"""The Mogrifier: x and h gate each other, in turns, before any cell's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from multint.cells.base import Cell, build_cell
from multint.cells.lstm import LSTMCell
from multint.integrators import SigmoidScale
from multint.integrators.checks import whole


class Mogrifier(Cell):
    """state' = cell(x, state) after i = 1 … r rounds: x ← 2σ(Q_i h) ⊙ x for odd i, h ← 2σ(R_i x) ⊙ h for even i.

    h is the state's first field; the others enter the step as they are, such as an LSTM's c. A GRU's h is also its
    memory, so there the rounds scale what is kept. Each round is a `SigmoidScale`: with one, x alone is gated, and with
    none the cell is as it is.

    Args:
        cell: factory `(X, H) -> Cell`.
        rounds: r, 0 or more.
        rank: that of every Q_i (X, H) and R_i (H, X), each a product of two matrices; None for full ones.

    Raises: OptionError for rounds below 0 or a rank below 1, and where the factory gives no cell.
    Source: Melis et al. 2020, eqs. 1 and 2, around an additive LSTM; r = 5 or 6 was the best there.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell: Callable[[int, int], Cell] = LSTMCell,
        rounds: int = 5,
        rank: int | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.cell = build_cell(self, cell, input_size, hidden_size)
        sizes = input_size, self.cell.initial_state(1)[0].shape[-1]
        self.rounds = nn.ModuleList()
        for i in range(whole(self, "rounds", rounds, 0)):
            gated, gating = sizes if i % 2 == 0 else sizes[::-1]
            self.rounds.append(SigmoidScale(gated, gating, gated, rank))

    def step(
        self,
        x: Tensor,  # (B, X)
        state: Any,  # the cell's
    ) -> Any:
        h = state[0]
        for i, scale in enumerate(self.rounds):
            if i % 2 == 0:
                x = scale(x, h)
            else:
                h = scale(h, x)
        return self.cell.step(x, type(state)(h, *state[1:]))

    def initial_state(self, batch_size: int) -> Any:
        return self.cell.initial_state(batch_size)
