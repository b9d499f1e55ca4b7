"""What of a piece is put into memory, and by which loops: sums, products, and what is put together of parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from multint.engines.cpp_rules import VIEWS, permuted, rule_of, slice_of
from multint.engines.cpp_values import (
    ROW,
    At,
    Node,
    Store,
    c_type,
    contiguous,
    inner,
    shape_of,
    with_row,
)
from multint.engines.failures import RefusedError
from multint.engines.private import row_dimensions

if TYPE_CHECKING:
    from multint.engines.cpp import Nest, Piece

aten = torch.ops.aten


def whole(piece: Piece, node: Node, target: str) -> None:
    """All elements of a node, as its rule says."""
    shape = inner(node)
    rule = rule_of(node)
    piece.stores.append(
        Store(
            node,
            [*node.all_input_nodes],
            target,
            shape,
            (),
            piece.level_after(node.all_input_nodes),
            lambda nest, at: rule(nest, node, with_row(node, at)),
            lambda at: contiguous(shape, at),
            "=",
        )
    )


def put_together(piece: Piece, node: Node, target: str) -> None:
    """`cat`: each part by loops of its own shape."""
    parts, dim = node.args[0], _inner_dim(node, node.args[1] if len(node.args) > 1 else 0)
    start = 0
    for part in parts:
        _copy(piece, node, part, target, dim, start, 1, piece.level_after([part]))
        start += inner(part)[dim]


def put_into(piece: Piece, node: Node, target: str) -> None:
    """`slice_scatter`: the whole first, then what stands in a part of it."""
    base, source = node.args[:2]
    _, over, start, step = slice_of(node, 1)
    if isinstance(shape_of(node)[over], torch.SymInt):  # all rows: nothing is left of the whole
        shape, level = inner(node), piece.level_after([source])
        c_type(node)
        value: Callable[[Nest, At], str] = lambda nest, at: nest.element(source, with_row(source, at))  # noqa: E731
        piece.stores.append(
            Store(node, [source], target, shape, (), level, value, lambda at: contiguous(shape, at), "=")
        )
        return
    dim = _inner_dim(node, node.args[2] if len(node.args) > 2 else 0)
    level = piece.level_after([base, source])
    _copy(piece, node, base, target, dim, 0, 1, level)
    _copy(piece, node, source, target, dim, start, step, level + 1)


def _copy(piece: Piece, node: Node, part: Node, target: str, dim: int, start: int, step: int, level: int) -> None:
    shape = inner(node)
    c_type(node)
    piece.stores.append(
        Store(
            node,
            [part],
            target,
            inner(part),
            (),
            level,
            lambda nest, at: nest.element(part, with_row(part, at)),
            lambda at: contiguous(shape, (*at[:dim], at[dim].scaled(step).moved(start), *at[dim + 1 :])),
            "=",
        )
    )


def _inner_dim(node: Node, dim: Any) -> int:
    """A dimension of the whole value as one of a row."""
    dim = int(dim) % len(shape_of(node))
    if dim in row_dimensions(node.meta["val"]):
        raise RefusedError("it puts rows together")
    return dim - sum(d < dim for d in row_dimensions(node.meta["val"]))


def reduction(join: str) -> Callable[[Piece, fx.Node, str], None]:
    """A sum or a maximum over some dimensions of a row."""

    def reduce(piece: Piece, node: Node, target: str) -> None:
        source: Node = node.args[0]
        dims: Any = node.args[1] if len(node.args) > 1 else []
        if node.kwargs or not dims:
            raise RefusedError(f"it has the operation {node.target} over all or with another dtype")
        reduced = tuple(sorted(_inner_dim(source, dim) for dim in dims))
        if 0 in inner(source):
            raise RefusedError("it sums nothing up")
        kept = [size for d, size in enumerate(inner(source)) if d not in reduced]
        c_type(node)
        piece.stores.append(
            Store(
                node,
                [source],
                target,
                inner(source),
                reduced,
                piece.level_after([source]),
                lambda nest, at: nest.element(source, with_row(source, at)),
                lambda at: contiguous(kept, tuple(i for d, i in enumerate(at) if d not in reduced)),
                join,
            )
        )

    return reduce


def products_of_rows(piece: Piece, node: Node, target: str) -> None:
    """`bmm`: a small product in each row, with loops in the order in which the right side lies in memory."""
    left, right = node.args
    if row_dimensions(node.meta["val"]) != [0]:
        raise RefusedError("it has a product that is not each row's own")
    rows, columns, count = *inner(node), shape_of(left)[2]
    c_type(node)
    turned = _turned(right)

    def value(nest: Nest, at: At) -> str:
        i, j, k = (at[0], at[1], at[2]) if turned else (at[0], at[2], at[1])
        return f"{nest.element(left, (ROW, i, k))} * {nest.element(right, (ROW, k, j))}"

    piece.stores.append(
        Store(
            node,
            [left, right],
            target,
            (rows, columns, count) if turned else (rows, count, columns),
            (2,) if turned else (1,),
            piece.level_after([left, right]),
            value,
            lambda at: contiguous((rows, columns), (at[0], at[1] if turned else at[2])),
            "sum",
        )
    )


def _turned(node: Node) -> bool:
    """Whether a matrix is a transposed view of what is in memory."""
    turns = 0
    while node.op == "call_function" and node.target in VIEWS:
        turns += VIEWS[node.target] is permuted
        node = node.args[0]
    return turns % 2 == 1


PARTS: dict[Any, Callable[[Piece, fx.Node, str], None]] = {
    aten.cat.default: put_together,
    aten.slice_scatter.default: put_into,
    aten.sum.dim_IntList: reduction("sum"),
    aten.amax.default: reduction("max"),
    aten.bmm.default: products_of_rows,
}


def is_made_of_parts(node: Node) -> bool:
    """Whether no single expression says what an element is."""
    return node.target in PARTS and not (node.target is aten.bmm.default and shape_of(node.args[0])[2] == 1)
