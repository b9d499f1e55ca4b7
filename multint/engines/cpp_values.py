"""Values of one row in C++: where an element stands, what is stored, and what a node's shape is in a row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from multint.engines.failures import RefusedError
from multint.engines.private import row_dimensions

if TYPE_CHECKING:
    from multint.engines.cpp import Nest

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
At = tuple[Index, ...]
Node = Any  # an fx.Node, whose arguments have no types of use


class Store(NamedTuple):
    """What a loop writes: for every element of a node, or of a reduction's operand, a place in memory."""

    node: Node
    sources: list[fx.Node]  # what its loop reads of
    target: str  # a name in C++
    shape: tuple[int, ...]  # of the loops, without the row
    reduced: tuple[int, ...]  # the loops that a sum or a maximum goes over
    level: int
    value: Callable[[Nest, At], str]  # the element at the loops' variables
    place: Callable[[At], Index]
    join: str  # "=", "+=" or, for reductions, "sum" and "max"


def check_rows(graph: fx.Graph) -> None:
    """Raise unless every size that has to do with the number of rows is that number."""
    values = [node.meta.get("val") for node in graph.nodes]
    tensors = [part for value in values for part in (value if isinstance(value, tuple | list) else [value])]
    sizes: list[Any] = [size for value in tensors if isinstance(value, Tensor) for size in value.shape]
    if len({size.node.expr for size in sizes if isinstance(size, torch.SymInt)}) > 1:
        raise RefusedError("it arranges the rows anew")


def literal(number: Any) -> str:
    """A Python number in C++."""
    if isinstance(number, bool):
        return "true" if number else "false"
    if not isinstance(number, int | float):
        raise RefusedError(f"an operation has {type(number).__name__} for a number")
    value = float(number)
    if math.isnan(value):
        return "NAN"
    if abs(value) > torch.finfo(torch.float32).max:
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{value!r}f"


def c_type(node: Node) -> str:
    """The type of a node's numbers in C++."""
    dtype = node.meta["val"].dtype
    if dtype not in (torch.float32, torch.bool):
        raise RefusedError(f"it computes in {str(dtype).removeprefix('torch.')}, and not in float32")
    return "float" if dtype == torch.float32 else "bool"


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape of a node's value, in which the number of rows is a symbol."""
    return tuple(node.meta["val"].shape)


def has_row(node: Node) -> bool:
    """Whether a node's value has rows."""
    return bool(row_dimensions(node.meta["val"]))


def inner(node: Node) -> tuple[int, ...]:
    """A value's shape in one row."""
    return tuple(size for size in shape_of(node) if not isinstance(size, torch.SymInt))


def with_row(node: Node, at: At) -> At:
    """An element's place in the whole value, from its place in one row."""
    rest = iter(at)
    return tuple(ROW if isinstance(size, torch.SymInt) else next(rest) for size in shape_of(node))


def contiguous(shape: Sequence[int], at: At) -> Index:
    """Where an element of a contiguous array stands."""
    place = ZERO
    for size, index in zip(shape, at, strict=True):
        place = place.scaled(size).added(index if size > 1 else ZERO)
    return place


def linear(node: Node, at: At) -> Index:
    """Where an element stands in the memory of its row."""
    pairs = list(zip(shape_of(node), at, strict=True))
    if any(isinstance(size, torch.SymInt) and index != ROW for size, index in pairs):
        raise RefusedError("a row reads another one")
    rest = [(size, index) for size, index in pairs if not isinstance(size, torch.SymInt)]
    return contiguous([size for size, _ in rest], tuple(index for _, index in rest))


def sums_rows(node: Node) -> bool:
    """Whether a node is a sum over the rows, and over nothing else."""
    if node.target is not aten.sum.dim_IntList:
        return False
    source: Node = node.args[0]
    dims = [d % len(shape_of(source)) for d in node.args[1]]
    return dims == row_dimensions(source.meta["val"])
