"""Where the elements of a value stand: in its dimensions, in the memory of one row, and in what a view is of."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from multint.engines import private
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


def check_rows(graph: fx.Graph) -> None:
    """Raise unless each value has one dimension of rows at most, whose size is a multiple of their number."""
    values = [node.meta.get("val") for node in graph.nodes]
    tensors = [part for value in values for part in (value if isinstance(value, tuple | list) else [value])]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            if len(row_dimensions(tensor)) > 1:
                raise RefusedError("it has a value for each two rows")
            for dim in row_dimensions(tensor):
                rows_in(tensor.shape[dim])


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
    sizes = (size for size in shape_of(node) if not is_row(size))
    return tuple(rows_in(size) if isinstance(size, torch.SymInt) else size for size in sizes)


def inner_dim(node: Node, dim: int) -> int:
    """A dimension of the whole value as one of a row."""
    dim %= len(shape_of(node))
    if dim in row_dimensions(node.meta["val"]):
        raise RefusedError("it works along the rows")
    return dim - sum(map(is_row, shape_of(node)[:dim]))


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


def linear(node: Node, at: Place) -> Index:
    """Where an element stands in the memory of its row, from its place in the whole value."""
    return contiguous(inner(node), tuple(i for size, i in zip(shape_of(node), at, strict=True) if not is_row(size)))


# ---- Views. Torch itself says where their elements stand, by a model of the source that has strides and no numbers.

_ROWS = 5  # of the model: any number but 1, which some operations treat otherwise

# What only arranges elements anew, though some of them have memory of their own.
_NAMES = """
    _unsafe_view alias clone detach diagonal expand flip permute select slice split split_with_sizes squeeze t transpose
    unbind unfold unsqueeze view
"""
_VIEWS = {getattr(getattr(aten, name), kind) for name in _NAMES.split() for kind in getattr(aten, name).overloads()}
_VIEWS.remove(aten.view.dtype)
_TO_SIZES = (aten.view.default, aten._unsafe_view.default, aten.expand.default)


class View(NamedTuple):
    """Where the elements of a view stand in a row of its source.

    Attributes:
        source: what it is a view of.
        start: the place of its first element.
        steps: for each of its dimensions, by how many places one step there goes in each dimension of the source's row.
        fits: whether no element leaves a dimension of the source, as those of a flattened matrix do: they are at their
            places in its memory alone.
        in_order: whether it has all elements of a row, in the same order.
    """

    source: Node
    start: list[int]
    steps: list[list[int]]
    fits: bool
    in_order: bool

    def place(self, at: Place) -> Place:
        """The place in a row of the source of an element of the view."""
        found = [Index((), start) for start in self.start]
        for index, steps in zip(at, self.steps, strict=True):
            found = [place.added(index.scaled(step)) for place, step in zip(found, steps, strict=True)]
        return tuple(found)


def is_view(node: Node) -> bool:
    """Whether a node only arranges the elements of another one anew."""
    return (node.args[0].target if node.target is operator.getitem else node.target) in _VIEWS


def view_of(node: Node) -> View:
    """A view as places of its source.

    Raises: RefusedError unless each of its rows is of the same row of the source.
    """
    call = node.args[0] if node.target is operator.getitem else node
    source: Node = call.args[0]
    shape, row = inner(source), math.prod(inner(source))
    seen = _view_of_model(call)
    seen = seen if call is node else seen[node.args[1]]
    start = seen.storage_offset() if seen.numel() else 0
    counts = [rows_in(size) if isinstance(size, torch.SymInt) else size for size in shape_of(node)]
    strides = [stride if count > 1 else 0 for count, stride in zip(counts, seen.stride(), strict=True)]
    # One row further is one row further in the source, if that has rows, and no other step leaves a row.
    by_row = [seen.stride(dim) * counts[dim] for dim in row_dimensions(node.meta["val"])]
    end = start + sum(stride * (count - 1) for count, stride in zip(counts, strides, strict=True))
    if by_row != ([row] if has_row(source) else [0] * len(by_row)) or end >= max(row, 1):
        raise RefusedError(f"it has the operation {call.target}, which arranges the rows anew")
    first, steps = _places(start, shape), [_places(stride, shape) for stride in strides]
    last = list(first)
    for count, step in zip(counts, steps, strict=True):
        last = [place + by * (count - 1) for place, by in zip(last, step, strict=True)]
    fits = all(place < size for place, size in zip(last, shape, strict=True))
    ordered = [stride if count > 1 else 0 for count, stride in zip(counts, _strides(counts), strict=True)]
    in_order = strides == ordered and math.prod(counts) == row
    if call.target is aten.flip.default:
        in_order = False
        for dim in (inner_dim(source, dim) for dim in call.args[1]):
            first[dim] = last[dim]
            for step in steps:
                step[dim] *= -1
    return View(source, first, steps, fits, in_order)


def _view_of_model(call: Node) -> Any:
    """What an operation makes of its source's model: there each row is contiguous, and the next one follows."""
    source: Node = call.args[0]
    within = iter(_strides(inner(source)))
    strides = [math.prod(inner(source)) if is_row(size) else next(within) for size in shape_of(source)]
    model = torch.empty_strided(_modelled(source), strides, device="meta")
    if call.target in (aten.flip.default, aten.clone.default):
        return model
    if call.all_input_nodes != [source] and call.target not in _TO_SIZES:
        raise RefusedError("it computes with the number of rows")
    args, kwargs = fx.node.map_arg((call.args[1:], call.kwargs), _modelled)
    try:
        return call.target(model, *args, **kwargs)
    except RuntimeError:  # such a view there is not, where the rows are in an order of their own
        raise RefusedError(f"it has the operation {call.target}, which arranges the rows anew") from None


def _modelled(node: Node) -> Any:
    """A node's shape, or its number, in the model."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return [int(size) for size in private.for_rows(value.shape, _ROWS)]
    return int(private.for_rows(value, _ROWS))


def _strides(shape: Sequence[int]) -> list[int]:
    """How far in memory one place goes in each dimension of a contiguous array."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _places(distance: int, shape: Sequence[int]) -> list[int]:
    """A distance in memory as places in each dimension."""
    return [distance // stride % size if stride else 0 for stride, size in zip(_strides(shape), shape, strict=True)]
