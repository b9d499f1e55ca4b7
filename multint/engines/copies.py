"""A copy of a cell on which its step is tried and traced: whatever the step does there, the cell does not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from multint.engines import private
from multint.engines.reads import Walk
from multint.engines.tripwire import Tripwire
from multint.errors import EngineError


class Copy:
    """A cell's copy, to be tried and traced: its tensors can be replaced, and what it may not use are tripwires.

    Raises: EngineError where the cell cannot be copied.
    """

    def __init__(self, cell: nn.Module) -> None:
        walk = Walk(cell)
        self.names, self.tensors = walk.names, [_clone(tensor) for tensor in walk.tensors]
        memo: dict[int, Any] = dict(zip(map(id, walk.tensors), self.tensors, strict=True))
        memo |= {i: Tripwire(name, type(value).__name__) for i, (value, name) in walk.unfollowed.items()}
        memo |= walk.python_modules
        try:
            self.cell: Any = copy.deepcopy(cell, memo)
        except Exception as error:
            raise EngineError(f"fused: the cell cannot be copied, to be traced: {error}") from error
        self._slots = [
            [(memo[id(holder)], how, name) for holder, how, name in slots if id(holder) in memo] for slots in walk.slots
        ]

    def __call__(self, tensors: Iterable[Tensor], x: Any, state: Any) -> Any:
        """The step, with the given tensors in the place of the cell's own."""
        try:
            self._put(tensors)
            return self.cell.step(x, state)
        finally:
            self._put(self.tensors)

    def _put(self, tensors: Iterable[Tensor]) -> None:
        for tensor, slots in zip(tensors, self._slots, strict=True):
            for holder, how, name in slots:
                _PLACES[how](holder)[name] = tensor

    def entries(self) -> dict[str, Any]:
        """What everything in the copy is, by name."""
        found = Walk(self.cell, named=True).entries
        assert found is not None
        return found


def _clone(tensor: Tensor) -> Tensor:
    """A tensor of the same numbers and kind, at the root of its own graph."""
    numbers = private.in_memory(tensor.detach()).clone()
    if isinstance(tensor, nn.Parameter):
        numbers = nn.Parameter(numbers, tensor.requires_grad)
    else:
        numbers.requires_grad_(tensor.requires_grad)
    vars(numbers).update(vars(tensor))
    return numbers


# Assigning to an attribute of a module would register a parameter: the dictionaries are written to instead.
_PLACES: dict[str, Callable[[Any], Any]] = {
    **private.PLACES,
    "attribute": vars,
    "entry": lambda container: container,
}


def as_state(kind: type, fields: list[Tensor]) -> Any:
    """A state of that type, a named tuple or a plain one."""
    return kind._make(fields) if hasattr(kind, "_make") else kind(fields)
