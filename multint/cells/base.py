"""What a cell is: one step in time, and the state it starts from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multint.integrators.checks import positive


class HiddenState(NamedTuple):
    """The state of a cell that carries its output alone."""

    h: Tensor  # (B, H)


class Cell(nn.Module, ABC):
    """One step of a recurrent network, in plain PyTorch.

    A subclass gives `step` and `initial_state`. A state is a named tuple of tensors (B, ...); its first field is the
    output. A step works on each row of the batch by itself, changes nothing in place, and draws no random numbers:
    masks, lengths, zoneout and dropout are the business of `Recurrent`.

    Raises: OptionError for a size below 1.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size = positive(self, "input_size", input_size)
        self.hidden_size = positive(self, "hidden_size", hidden_size)

    @abstractmethod
    def step(
        self,
        x: Tensor,  # (B, X)
        state: Any,  # a named tuple of tensors (B, ...)
    ) -> Any:
        """The state after one step on the input x."""

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """The state before the first step."""

    def forward(
        self,
        x: Tensor,  # (B, X)
        state: Any = None,
    ) -> Any:
        """One step, from the initial state where none is given."""
        return self.step(x, self.initial_state(x.shape[0]) if state is None else state)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros on the cell's device and in its dtype."""
        parameter = next(self.parameters(), None)
        return torch.zeros(shape) if parameter is None else parameter.new_zeros(shape)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"
