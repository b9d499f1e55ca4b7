"""What a cell is: one step in time, and the state it starts from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multint.errors import OptionError, OptionTypeError, ShapeError
from multint.integrators.checks import positive


class HiddenState(NamedTuple):
    """The state of a cell that carries its output alone."""

    h: Tensor  # (B, H)


class Cell(nn.Module, ABC):
    """One step of a recurrent network, in plain PyTorch.

    A subclass gives `step` and `initial_state`. A state is a named tuple of tensors (B, ...); its first field is the
    output. A step works on each row of the batch by itself, changes nothing in place, and draws no random numbers:
    masks, lengths, zoneout and dropout are the business of `Recurrent`. What it only reads, as an encoder's outputs to
    attend to, may be a field that it gives back as it came: that is never copied.

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
        """One step, from the initial state where none is given.

        Raises: ShapeError for an x without a batch, for a state of other dimensions than the cell's own, and where x
        and the state broadcast: for one of other rows than the other, and for a new state of more dimensions.
        """
        if x.ndim < 2 and x.is_floating_point():  # a cell of its own may read symbols (B,)
            raise ShapeError(
                f"{type(self).__name__}: x has the shape {tuple(x.shape)}, expected (B, {self.input_size})"
            )
        if state is None:
            state = self.initial_state(x.shape[0])
        elif any(field.ndim != x.ndim for field in state):  # as they are in most cells, which are spared the look
            for name, field, own in zip(state._fields, state, self.initial_state(1), strict=True):
                if field.ndim != own.ndim:
                    raise ShapeError(
                        f"{type(self).__name__}: state.{name} has the shape {tuple(field.shape)}, expected "
                        f"({', '.join(map(str, (x.shape[0], *own.shape[1:])))})"
                    )
        new = self.step(x, state)
        for name, old, value in zip(new._fields, state, new, strict=True):
            if old.shape[:1] != x.shape[:1] or value.ndim != old.ndim:
                raise ShapeError(
                    f"{type(self).__name__}: x {tuple(x.shape)} and state.{name} {tuple(old.shape)} make a new state "
                    f"{tuple(value.shape)}, expected a row of the state for each of x, (B, ...)"
                )
        return new

    def zeros(self, *shape: int) -> Tensor:
        """Zeros on the cell's device and in its dtype."""
        parameter = next(self.parameters(), None)
        return torch.zeros(shape) if parameter is None else parameter.new_zeros(shape)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


def build_cell(
    owner: nn.Module,
    factory: Callable[[int, int], Cell],
    input_size: int,
    hidden_size: int,
) -> Cell:
    """The cell that the owner's argument `cell`, a factory, gives for these sizes.

    Raises: OptionError where the factory is none, or gives no cell with a named tuple for its state.
    """
    name = type(owner).__name__
    if isinstance(factory, nn.Module) or not callable(factory):
        raise OptionTypeError(
            f"{name}: cell is a {type(factory).__name__}, expected a factory (input_size, hidden_size) -> Cell, "
            "such as the class, since every layer and direction has a cell of its own"
        )
    cell = factory(input_size, hidden_size)
    if not isinstance(cell, Cell):
        raise OptionError(f"{name}: cell gives a {type(cell).__name__}, expected a multint.Cell")
    state = cell.initial_state(1)
    if not (isinstance(state, tuple) and hasattr(state, "_fields")):
        raise OptionError(
            f"{name}: {type(cell).__name__}.initial_state gives a {type(state).__name__}, expected a named tuple of "
            "tensors (B, ...), such as multint.cells.HiddenState"
        )
    return cell
