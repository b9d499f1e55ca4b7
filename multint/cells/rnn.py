"""The simple recurrent cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multint.cells.base import Cell, HiddenState
from multint.integrators import Integrator, MultiplicativeIntegration
from multint.integrators.base import build


class RNNCell(Cell):
    """h' = φ(f(x, h)) for any integrator f.

    With `Additive` this is `nn.RNNCell`, with `MultiplicativeIntegration` the MI-RNN, and with `torch.nn.Identity()`
    as φ the linear RNN.

    Args:
        integrator: factory `(X, H, H) -> Integrator` of f.
        activation: φ, elementwise.

    Source: Wu et al. 2016, section 2.2.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
        activation: Callable[[Tensor], Any] = torch.tanh,  # -> Any: jsonargparse takes -> Tensor for a class to build
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.integrator = build(self, "integrator", integrator, input_size, hidden_size, hidden_size)
        self.activation = activation

    def step(
        self,
        x: Tensor,  # (B, X)
        state: HiddenState,
    ) -> HiddenState:
        return HiddenState(self.activation(self.integrator(x, state.h)))

    def initial_state(self, batch_size: int) -> HiddenState:
        return HiddenState(self.zeros(batch_size, self.hidden_size))
