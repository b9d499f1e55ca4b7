"""The simple recurrent cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multint.cells.base import Cell, HiddenState
from multint.integrators import Integrator, MultiplicativeIntegration
from multint.integrators.base import build
from multint.integrators.checks import check_callable, number


class RNNCell(Cell):
    """h' = φ(f(x, h)) for any integrator f.

    With `Additive` this is `nn.RNNCell`, with `MultiplicativeIntegration` the MI-RNN, and with `torch.nn.Identity()`
    as φ the linear RNN. With a `Bilinear` that has no lower-order terms and `torch.nn.functional.normalize` it is
    h' = A_x h / ‖A_x h‖, a matrix for every input: it tracks the state of any finite-state machine. That one needs a
    `start`, since it never leaves 0.

    Args:
        integrator: factory `(X, H, H) -> Integrator` of f.
        activation: φ, elementwise, or of each row.
        start: what every feature of the initial state is.

    Source: Wu et al. 2016, section 2.2; Ebrahimi and Memisevic 2025 for the bilinear one.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
        activation: Callable[[Tensor], Any] = torch.tanh,  # -> Any: jsonargparse takes -> Tensor for a class to build
        start: float = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.integrator = build(self, "integrator", integrator, input_size, hidden_size, hidden_size)
        check_callable(self, "activation", activation, "a function, such as torch.tanh")
        self.activation = activation
        self.start = number(self, "start", start)

    def step(
        self,
        x: Tensor,  # (B, X)
        state: HiddenState,
    ) -> HiddenState:
        return HiddenState(self.activation(self.integrator(x, state.h)))

    def initial_state(self, batch_size: int) -> HiddenState:
        return HiddenState(self.zeros(batch_size, self.hidden_size) + self.start)
