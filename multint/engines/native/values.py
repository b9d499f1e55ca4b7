"""Values of one row in C++: where an element stands, what is stored, and what a node's shape is in a row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx

from multint.engines.failures import RefusedError
from multint.engines.private import row_dimensions, rows_in

aten = torch.ops.aten


class Index(NamedTuple):
    """Where an element stands in a dimension: a sum of loop variables, each with its factor, and a constant."""

    terms: tuple[tuple[str, int], ...] = ()
    plus: int = 0

    def scaled(self, by: int) -> Index:
        """Times a whole number."""
        return Index(tuple((name, factor * by) for name, factor in self.terms if by), self.plus * by)

    def moved(self, by: int) -> Index:
        """Plus a whole number."""
        return Index(self.terms, self.plus + by)

    def added(self, other: Index) -> Index:
        """Plus another one."""
        factors: dict[str, int] = defaultdict(int)
        for name, factor in (*self.terms, *other.terms):
            factors[name] += factor
        return Index(tuple((n, f) for n, f in factors.items() if f), self.plus + other.plus)

    def __str__(self) -> str:
        parts = [name if factor == 1 else f"{factor} * {name}" for name, factor in self.terms]
        return " + ".join([*parts, *([str(self.plus)] if self.plus or not parts else [])])


ROW, ZERO = Index((("row", 1),)), Index()
Place = tuple[Index, ...]
Node = Any  # an fx.Node, whose arguments have no types of use


class Nest(Protocol):
    """Loops over one shape, in which each element is computed once."""

    @property
    def stored(self) -> dict[fx.Node, str]:
        """Where nodes' elements are in memory, by their name in C++."""

    def element(self, node: Any, at: Place) -> str:
        """The C++ name of an element of a node's value."""


class Writer(Protocol):
    """A function of one row in the making.

    Attributes:
        stores: what its loops write.
    """

    stores: list[Store]

    def level_after(self, nodes: Sequence[Node]) -> int:
        """The first level of loops that can read what others write of some nodes."""


class Store(NamedTuple):
    """What a loop writes: for every element of a node, or of a reduction's operand, a place in memory."""

    node: Node
    sources: list[fx.Node]  # what its loop reads of
    target: str  # a name in C++
    shape: tuple[int, ...]  # of the loops, without the row
    reduced: tuple[int, ...]  # the loops that a sum or a maximum goes over
    level: int
    value: Callable[[Nest, Place], str]  # the element at the loops' variables
    place: Callable[[Place], Index]
    join: str  # "=", "+=", "in order" for "=" of what was written before, or a reduction's "sum", "max", …


def check_rows(graph: fx.Graph) -> None:
    """Raise unless every size that has to do with the number of rows is a multiple of it."""
    values = [node.meta.get("val") for node in graph.nodes]
    tensors = [part for value in values for part in (value if isinstance(value, tuple | list) else [value])]
    for size in (size for value in tensors if isinstance(value, Tensor) for size in value.shape):
        if isinstance(size, torch.SymInt):
            rows_in(size)


def literal(number: Any) -> str:
    """A Python number in C++."""
    if isinstance(number, bool):
        return "true" if number else "false"
    if not isinstance(number, int | float):
        raise RefusedError(f"an operation has {type(number).__name__} for a number")
    value = float(number)
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"(real){value!r}"


def c_type(node: Node) -> str:
    """The type of a node's numbers in C++, where that of floating-point numbers is the loop's own."""
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return "real"
    return "bool" if dtype == torch.bool else "int64_t"


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape of a node's value, in which the number of rows is a symbol."""
    return tuple(node.meta["val"].shape)


def has_row(node: Node) -> bool:
    """Whether a node's value has rows."""
    return bool(row_dimensions(node.meta["val"]))


def is_row(size: Any) -> bool:
    """Whether a dimension of that size has one number for each row."""
    return isinstance(size, torch.SymInt) and rows_in(size) == 1


def inner(node: Node) -> tuple[int, ...]:
    """A value's shape in one row. A dimension of k numbers for each row has the size k there."""
    sizes = (rows_in(size) if isinstance(size, torch.SymInt) else size for size in shape_of(node))
    return tuple(size for size, whole in zip(sizes, shape_of(node), strict=True) if not is_row(whole))


def with_row(node: Node, at: Place) -> Place:
    """An element's place in the whole value, from its place in one row."""
    rest = iter(at)
    return tuple(ROW if is_row(size) else next(rest) for size in shape_of(node))


def contiguous(shape: Sequence[int], at: Place) -> Index:
    """Where an element of a contiguous array stands."""
    place = ZERO
    for size, index in zip(shape, at, strict=True):
        place = place.scaled(size).added(index if size > 1 else ZERO)
    return place


def without_row(node: Node, at: Place) -> Place:
    """An element's place in one row, from its place in the whole value."""
    places = [(is_row(size), index) for size, index in zip(shape_of(node), at, strict=True)]
    if any(of_rows and index != ROW for of_rows, index in places):
        raise RefusedError("a row reads another one")
    return tuple(index for of_rows, index in places if not of_rows)


def linear(node: Node, at: Place) -> Index:
    """Where an element stands in the memory of its row."""
    return contiguous(inner(node), without_row(node, at))


def sums_rows(node: Node) -> bool:
    """Whether a node is a sum over the rows, and over nothing else."""
    if node.target is not aten.sum.dim_IntList:
        return False
    source: Node = node.args[0]
    return [d % len(shape_of(source)) for d in node.args[1]] == row_dimensions(source.meta["val"])
