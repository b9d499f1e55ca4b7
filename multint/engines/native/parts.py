"""What of a piece is put into memory, and by which loops: sums, products, and what is put together of parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from multint.engines.failures import RefusedError
from multint.engines.native.elements import VIEWS, permuted, rule_of, slice_of
from multint.engines.native.values import (
    ROW,
    Index,
    Nest,
    Node,
    Place,
    Store,
    Writer,
    c_type,
    contiguous,
    inner,
    is_row,
    shape_of,
    sums_rows,
    with_row,
)
from multint.engines.private import row_dimensions

aten = torch.ops.aten


def whole(writer: Writer, node: Node, target: str) -> None:
    """All elements of a node, as its rule says."""
    shape = inner(node)
    rule = rule_of(node)
    writer.stores.append(
        Store(
            node,
            [*node.all_input_nodes],
            target,
            shape,
            (),
            writer.level_after(node.all_input_nodes),
            lambda nest, at: rule(nest, node, with_row(node, at)),
            lambda at: contiguous(shape, at),
            "=",
        )
    )


def put_together(writer: Writer, node: Node, target: str) -> None:
    """`cat`: each part by loops of its own shape."""
    parts, dim = node.args[0], _inner_dim(node, node.args[1] if len(node.args) > 1 else 0)
    start = 0
    for part in parts:
        _copy(writer, node, part, target, dim, start, 1, writer.level_after([part]))
        start += inner(part)[dim]


def put_into(writer: Writer, node: Node, target: str) -> None:
    """`slice_scatter`: the whole first, then what stands in a part of it."""
    base, source = node.args[:2]
    _, over, start, step = slice_of(node, 1)
    if isinstance(shape_of(node)[over], torch.SymInt):  # all rows: nothing is left of the whole
        shape, level = inner(node), writer.level_after([source])
        c_type(node)
        value: Callable[[Nest, Place], str] = lambda nest, at: nest.element(source, with_row(source, at))  # noqa: E731
        writer.stores.append(
            Store(node, [source], target, shape, (), level, value, lambda at: contiguous(shape, at), "=")
        )
        return
    dim = _inner_dim(node, node.args[2] if len(node.args) > 2 else 0)
    level = writer.level_after([base, source])
    _copy(writer, node, base, target, dim, 0, 1, level)
    _copy(writer, node, source, target, dim, start, step, level + 1)


def _copy(writer: Writer, node: Node, part: Node, target: str, dim: int, start: int, step: int, level: int) -> None:
    shape = inner(node)
    c_type(node)
    writer.stores.append(
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
    return dim - sum(map(is_row, shape_of(node)[:dim]))


def reduction(join: str) -> Callable[[Writer, fx.Node, str], None]:
    """A sum, a product or an extreme over some dimensions of a row; over all of a value's where none is named."""

    def reduce(writer: Writer, node: Node, target: str) -> None:
        source: Node = node.args[0]
        dims: Any = node.args[1] if len(node.args) > 1 and node.args[1] != [] else range(len(shape_of(source)))
        dims = [dims] if isinstance(dims, int) else dims
        reduced = tuple(sorted(_inner_dim(source, dim) for dim in dims))
        if 0 in inner(source):
            raise RefusedError(f"it has the operation {node.target} of nothing")
        kept = [size for d, size in enumerate(inner(source)) if d not in reduced]
        c_type(node)
        writer.stores.append(
            Store(
                node,
                [source],
                target,
                inner(source),
                reduced,
                writer.level_after([source]),
                lambda nest, at: nest.element(source, with_row(source, at)),
                lambda at: contiguous(kept, tuple(i for d, i in enumerate(at) if d not in reduced)),
                join,
            )
        )

    return reduce


def running(sign: str) -> Callable[[Writer, fx.Node, str], None]:
    """The sums, or products, of a dimension's first numbers, each of the one before."""

    def run(writer: Writer, node: Node, target: str) -> None:
        source: Node = node.args[0]
        dim, shape = _inner_dim(source, node.args[1]), inner(source)

        def value(nest: Nest, at: Place) -> str:
            before = contiguous(shape, (*at[:dim], at[dim].moved(-1), *at[dim + 1 :]))
            made = nest.element(source, with_row(source, at))
            return f"{at[dim]} == 0 ? {made} : {target}[{before}] {sign} {made}"

        c_type(node)
        level = writer.level_after([source])
        place: Callable[[Place], Index] = lambda at: contiguous(shape, at)  # noqa: E731
        writer.stores.append(Store(node, [source], target, shape, (), level, value, place, "in order"))

    return run


def products_of_rows(writer: Writer, node: Node, target: str) -> None:
    """`bmm`, or `mm` with a matrix: a product in each row, in the order in which the right side lies in memory."""
    left, right = node.args
    of_vectors = node.target is aten.mm.default
    if row_dimensions(node.meta["val"]) != [0]:
        raise RefusedError(f"it has the operation {node.target} of other matrices than each row's own")
    shape = (1, *inner(node)) if of_vectors else inner(node)
    *several, rows, columns = shape  # several products in a row have a first dimension
    count, first = shape_of(left)[-1], len(several)
    c_type(node)
    turned = _turned(right)

    def value(nest: Nest, at: Place) -> str:
        i, j, k = (at[-3], at[-2], at[-1]) if turned else (at[-3], at[-1], at[-2])
        if of_vectors:
            return f"{nest.element(left, (ROW, k))} * {nest.element(right, (k, j))}"
        which = at[0] if several else ROW
        return f"{nest.element(left, (which, i, k))} * {nest.element(right, (which, k, j))}"

    writer.stores.append(
        Store(
            node,
            [left, right],
            target,
            (*several, rows, columns, count) if turned else (*several, rows, count, columns),
            (first + 2,) if turned else (first + 1,),
            writer.level_after([left, right]),
            value,
            lambda at: contiguous(shape, (*at[: first + 1], at[-2] if turned else at[-1])),
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


PARTS: dict[Any, Callable[[Writer, fx.Node, str], None]] = {
    aten.cat.default: put_together,
    aten.slice_scatter.default: put_into,
    aten.sum.dim_IntList: reduction("sum"),
    aten.prod.dim_int: reduction("product"),
    aten.amax.default: reduction("max"),
    aten.amin.default: reduction("min"),
    aten.cumsum.default: running("+"),
    aten.cumprod.default: running("*"),
    aten.bmm.default: products_of_rows,
    aten.mm.default: products_of_rows,
}


def is_made_of_parts(node: Node) -> bool:
    """Whether no single expression says what an element is."""
    if node.target is aten.bmm.default and shape_of(node.args[0])[2] == 1:
        return False
    return node.target in PARTS and not sums_rows(node)
