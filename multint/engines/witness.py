"""A quick look at what a walk has read: is all of it still as it was?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Witness:
    """What a walk (`reads.py`) has read, to be looked at again in a small part of a walk's time.

    It holds on to every value that it knows by identity, so that no identity comes twice. Where one of them may hold
    the cell in its turn, the witness would keep it alive, so the walk calls it incomplete.

    Attributes:
        is_complete: whether all that the walk has read can be looked at in this way. Else nothing else here counts.
    """

    def __init__(self) -> None:
        self.is_complete = True
        self._empty: list[Any] = []
        self._dictionaries: list[tuple[dict[Any, Any], list[int], list[int], list[Any]]] = []
        self._sequences: list[tuple[Sequence[Any], list[int], list[Any]]] = []
        self._tensors: list[tuple[Any, ...]] = []
        self._types: list[tuple[Any, type]] = []
        self._classes: dict[type, Any] = {}

    def dictionary(self, found: dict[Any, Any]) -> None:
        """Know its keys and its values by identity."""
        if not found:
            self._empty.append(found)
            return
        self.is_complete &= all(type(key) in (str, int) for key in found)
        ids = list(map(id, found)), list(map(id, found.values()))
        self._dictionaries.append((found, *ids, list(found.items())))

    def sequence(self, found: Sequence[Any]) -> None:
        """Know its entries by identity."""
        self._sequences.append((found, list(map(id, found)), list(found)))

    def tensor(self, tensor: Tensor) -> None:
        """Know all of it but its numbers."""
        self._tensors.append((tensor, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad))

    def type_of(self, value: Any) -> None:
        """Know its class, which can be assigned."""
        self._types.append((value, type(value)))

    def contents(self, kind: type, number: Any) -> None:
        """Know what is in a class by the number that says so."""
        self._classes[kind] = number

    def holds(self, contents_of: Callable[[type], Any]) -> bool:
        """Whether all is as it was. The argument gives a class's number."""
        if any(self._empty):
            return False
        for found, keys, values, _ in self._dictionaries:
            if list(map(id, found.values())) != values or list(map(id, found)) != keys:
                return False
        for entries, ids, _ in self._sequences:
            if list(map(id, entries)) != ids:
                return False
        if any(type(value) is not kind for value, kind in self._types):
            return False
        for tensor, shape, stride, dtype, device, learnt in self._tensors:
            if tensor.dtype is not dtype or tensor.requires_grad is not learnt or tensor.shape != shape:
                return False
            if tensor.stride() != stride or tensor.device != device:
                return False
        return all(contents_of(kind) == number for kind, number in self._classes.items())
