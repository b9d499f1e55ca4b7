"""What an element of an operation's result is, by elements of its arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from multint.engines.failures import RefusedError
from multint.engines.native.values import (
    ROW,
    ZERO,
    Index,
    Nest,
    Node,
    Place,
    c_type,
    contiguous,
    has_row,
    inner,
    literal,
    shape_of,
    sums_rows,
    with_row,
    without_row,
)
from multint.engines.private import row_dimensions

aten = torch.ops.aten

Rule = Callable[[Nest, fx.Node, Place], str]


def rule_of(node: Node) -> Rule:
    """What an element of a node is.

    Raises: RefusedError for an operation without a rule, or of another dtype.
    """
    found = _RULES.get(node.target) if node.op == "call_function" else None
    if found is None:
        raise RefusedError(f"it has the operation {node.target}, for which there is no rule")
    c_type(node)
    return found


def operand(nest: Nest, node: Node, argument: Any, at: Place) -> str:
    """The element of an argument that meets the node's element: its shape is spread to the node's."""
    if not isinstance(argument, fx.Node):
        return literal(argument)
    if not isinstance(argument.meta.get("val"), Tensor):
        raise RefusedError("it computes with the number of rows")
    count = len(shape_of(argument))
    return nest.element(argument, at[len(at) - count :] if count else ())


def pointwise(template: str) -> Rule:
    """An operation on each number by itself, by its C++ with the numbers of its arguments in their places."""

    def rule(nest: Nest, node: Node, at: Place) -> str:
        values = [operand(nest, node, argument, at) for argument in node.args]
        alpha = node.kwargs.get("alpha", 1)
        return template.format(*values, alpha=literal(alpha))

    return rule


def scaled_sum(sign: str) -> Rule:
    """A sum or a difference, whose second term may have a factor."""

    def rule(nest: Nest, node: Node, at: Place) -> str:
        left, right = (operand(nest, node, argument, at) for argument in node.args[:2])
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        return f"{left} {sign} {right}" if alpha == 1 else f"{left} {sign} {literal(alpha)} * {right}"

    return rule


def power(nest: Nest, node: Node, at: Place) -> str:
    """x^y."""
    base, exponent = operand(nest, node, node.args[0], at), node.args[1]
    if not isinstance(exponent, fx.Node) and exponent in _POWERS:
        return _POWERS[exponent].format(base)
    return f"std::pow({base}, {operand(nest, node, exponent, at)})"


# Those that torch computes so, too: the power 0.5 of −∞ is NaN as a root, and ∞ as a power.
_POWERS = {
    2: "{0} * {0}",
    3: "{0} * {0} * {0}",
    0.5: "std::sqrt({0})",
    -0.5: "1.0f / std::sqrt({0})",
    -1: "1.0f / {0}",
    -2: "1.0f / ({0} * {0})",
}


def clamped(nest: Nest, node: Node, at: Place) -> str:
    """A number within bounds."""
    value, low, high = [operand(nest, node, a, at) if a is not None else None for a in (*node.args, None, None)][:3]
    if "NAN" in (low, high):
        return "NAN"
    value = value if low is None else f"({value} < {low} ? {low} : {value})"
    return str(value) if high is None else f"({value} > {high} ? {high} : {value})"


def embedded(nest: Nest, node: Node, at: Place) -> str:
    """The element in the row of a table that the own number says."""
    table, symbol = node.args[:2]
    row = Index(((f"(int64_t){nest.element(symbol, at[:-1])}", 1),))
    return nest.element(table, (row, at[-1]))


def gathered(nest: Nest, node: Node, at: Place) -> str:
    """The element at the place of one dimension that an index says."""
    source, dim, index = node.args[:3]
    dim %= len(at)
    place = Index(((f"(int64_t){nest.element(index, at)}", 1),))
    return nest.element(source, (*at[:dim], place, *at[dim + 1 :]))


def indexed(nest: Nest, node: Node, at: Place) -> str:
    """The element at the place of one dimension that a vector of places says."""
    source, indices = node.args
    (dim, *others) = [d for d, index in enumerate(indices) if index is not None]
    if others or len(shape_of(indices[dim])) != 1 or row_dimensions(source.meta["val"]) != [0] or dim == 0:
        raise RefusedError(f"it has the operation {node.target} of several indices, or of the rows")
    place = Index(((f"(int64_t){nest.element(indices[dim], (at[dim],))}", 1),))
    return nest.element(source, (*at[:dim], place, *at[dim + 1 :]))


def counted(nest: Nest, node: Node, at: Place) -> str:
    """`arange`: a place's own number."""
    start, step = (0, 1) if node.target is aten.arange.default else (node.args[0], (*node.args[2:3], 1)[0])
    if has_row(node) or isinstance(start, fx.Node) or isinstance(step, fx.Node):
        raise RefusedError("it computes with the number of rows")
    return f"({c_type(node)})({at[0]}) * {literal(step)} + {literal(start)}"


def constant(value: Callable[[fx.Node], Any]) -> Rule:
    """The same number everywhere."""
    return lambda nest, node, at: literal(value(node))


def same(nest: Nest, node: Node, at: Place) -> str:
    """The argument's own element."""
    return nest.element(node.args[0], at)


def cast(nest: Nest, node: Node, at: Place) -> str:
    """The element in another type."""
    return f"({c_type(node)})({nest.element(node.args[0], at)})"


def expanded(nest: Nest, node: Node, at: Place) -> str:
    """The element of what is spread over new or wider dimensions."""
    return operand(nest, node, node.args[0], at)


def sliced(nest: Nest, node: Node, at: Place) -> str:
    """An element some places further."""
    source, dim, start, step = slice_of(node, 0)
    return nest.element(source, (*at[:dim], at[dim].scaled(step).moved(start), *at[dim + 1 :]))


def slice_of(node: Node, first: int) -> tuple[Node, int, int, int]:
    """What is sliced, and where: the arguments from `first` on are the source, dim, start, end and step."""
    source: Node = node.args[0]
    rest = [*node.args[first + 1 :], *[None] * 4]
    size = shape_of(source)
    dim = int(rest[0] or 0) % len(size)
    if isinstance(size[dim], torch.SymInt):
        if rest[1] in (0, None) and rest[3] in (1, None) and shape_of(node)[dim] == size[dim]:
            return source, dim, 0, 1
        raise RefusedError("it slices the rows")
    start = int(rest[1] or 0)
    start = max(0, start + size[dim]) if start < 0 else min(start, size[dim])
    return source, dim, start, int(rest[3] or 1)


def selected(nest: Nest, node: Node, at: Place) -> str:
    """An element at a fixed place of one dimension."""
    source, dim, place = node.args
    size = shape_of(source)
    dim = dim % len(size)
    if isinstance(size[dim], torch.SymInt):
        raise RefusedError("it selects a row")
    return nest.element(source, (*at[:dim], Index((), place % size[dim]), *at[dim:]))


def unsqueezed(nest: Nest, node: Node, at: Place) -> str:
    """The element without a new dimension of size 1."""
    dim = node.args[1] % len(at)
    return nest.element(node.args[0], (*at[:dim], *at[dim + 1 :]))


def squeezed(nest: Nest, node: Node, at: Place) -> str:
    """The element with the dimensions of size 1 that were taken out."""
    source: Node = node.args[0]
    size = shape_of(source)
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    gone = {d % len(size) for d in dims if not isinstance(size[d], torch.SymInt) and size[d] == 1}
    rest = iter(at)
    return nest.element(source, tuple(ZERO if d in gone else next(rest) for d in range(len(size))))


def windowed(nest: Nest, node: Node, at: Place) -> str:
    """`unfold`: the element at a place of a window, which is the last dimension."""
    source, dim, _, step = node.args
    dim %= len(at) - 1
    if isinstance(shape_of(source)[dim], torch.SymInt):
        raise RefusedError("it unfolds the rows")
    return nest.element(source, (*at[:dim], at[dim].scaled(step).added(at[-1]), *at[dim + 1 : -1]))


def diagonal(nest: Nest, node: Node, at: Place) -> str:
    """The element at one place of two dimensions."""
    source, offset, dim1, dim2 = (*node.args, 0, 0, 1)[:4] if len(node.args) == 1 else (*node.args, 1)[:4]
    size = shape_of(source)
    dim1, dim2 = dim1 % len(size), dim2 % len(size)
    if isinstance(size[dim1], torch.SymInt) or isinstance(size[dim2], torch.SymInt):
        raise RefusedError("it takes a diagonal of the rows")
    places = {dim1: at[-1].moved(max(0, -offset)), dim2: at[-1].moved(max(0, offset))}
    rest = iter(at)
    return nest.element(source, tuple(places.get(d) or next(rest) for d in range(len(size))))


def own_part(nest: Nest, node: Node, at: Place) -> str:
    """What a row gives to a sum over the rows: `check_sums` lets nothing but a sum of the results come of it."""
    if not sums_rows(node):
        raise RefusedError(f"it has the operation {node.target} of rows")
    source: Node = node.args[0]
    rows = row_dimensions(source.meta["val"])
    if len(at) == len(shape_of(source)):
        return nest.element(source, tuple(ROW if d in rows else i for d, i in enumerate(at)))
    rest = iter(at)
    return nest.element(source, tuple(ROW if d in rows else next(rest) for d in range(len(shape_of(source)))))


def check_sums(graph: fx.Graph, adds: list[bool]) -> None:
    """Raise unless a sum over the rows is a result that each row adds its own part to.

    On the way to the result a part may only go through what is linear: the results of the parts then add up to that of
    the sum. So it is in a derivative, which is linear in what it is given.
    """
    parts: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if sums_rows(node):
            parts.add(node)
        elif parts.intersection(node.all_input_nodes):
            if not isinstance(node.meta["val"], Tensor) or has_row(node) or not _is_linear(node, parts):
                raise RefusedError("it has the operation aten.sum.dim_IntList over the rows")
            parts.add(node)
    results: Any = graph.output_node().args[0]
    for node, add in zip(results, adds, strict=True):
        if not has_row(node) and not (add and node in parts):
            raise RefusedError("it has a result without rows that is no sum over the rows")


def _is_linear(node: Node, parts: set[fx.Node]) -> bool:
    """Whether a node is linear in the parts that it is computed of."""
    if node.target in VIEWS or node.target in (aten.neg.default, aten._to_copy.default, aten.sum.dim_IntList):
        return True
    sides = [side in parts for side in node.args[:2] if isinstance(side, fx.Node)]
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return sum(sides) == 1
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        return sides[0] and sum(sides) == 1
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return sides == [True, True]
    if node.target in (aten.cat.default, aten.slice_scatter.default):
        return all(side in parts or _is_zero(side) for side in node.all_input_nodes)
    return False


def _is_zero(node: Node) -> bool:
    return node.target is aten.full.default and node.args[1] == 0


def flipped(nest: Nest, node: Node, at: Place) -> str:
    """The element at the same distance from the other end of some dimensions."""
    source: Node = node.args[0]
    size = shape_of(source)
    dims = {d % len(size) for d in node.args[1]}
    if any(isinstance(size[d], torch.SymInt) for d in dims):
        raise RefusedError("it turns the rows around")
    return nest.element(source, tuple(i.scaled(-1).moved(size[d] - 1) if d in dims else i for d, i in enumerate(at)))


def permuted(nest: Nest, node: Node, at: Place) -> str:
    """The element with the dimensions in another order."""
    source: Node = node.args[0]
    count = len(shape_of(source))
    order = [*range(count)]
    if node.target is aten.permute.default:
        order = [d % count for d in node.args[1]]
    else:
        a, b = (int(d) % count for d in (node.args[1:] or (0, 1)))
        order[a], order[b] = order[b], order[a]
    place = dict(zip(order, at, strict=True))
    return nest.element(source, tuple(place[d] for d in range(count)))


def viewed(nest: Nest, node: Node, at: Place) -> str:
    """The same memory by other dimensions, or dimensions of size 1 more or fewer."""
    source: Node = node.args[0]
    if _before_rows(source) != _before_rows(node):
        raise RefusedError(f"it has the operation {node.target}, which arranges the rows anew")
    own = without_row(node, at)
    if source in nest.stored:
        return f"{nest.stored[source]}[{contiguous(inner(node), own)}]"
    rest = iter(index for index, size in zip(own, inner(node), strict=True) if size > 1)
    return nest.element(source, with_row(source, tuple(next(rest) if n > 1 else ZERO for n in inner(source))))


def _before_rows(node: Node) -> int:
    """How many numbers stand before the dimension of the rows in the order of memory, by blocks of that dimension."""
    dims = row_dimensions(node.meta["val"])
    return math.prod(shape_of(node)[: dims[0]]) if len(dims) == 1 else -len(dims)


def is_rearranged(node: Node) -> bool:
    """Whether a view has other dimensions than its source, but for those of size 1."""
    source = node.args[0]
    return [n for n in inner(node) if n != 1] != [n for n in inner(source) if n != 1]


def part_of_split(nest: Nest, node: Node, at: Place) -> str:
    """An element of one of the parts that a value was split into."""
    split, number = node.args
    source, dim = split.args[0], (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0))
    if split.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        raise RefusedError(f"it has the operation {split.target}")
    dim %= len(shape_of(source))
    if isinstance(shape_of(source)[dim], torch.SymInt):
        raise RefusedError("it splits the rows")
    sizes = [value.shape[dim] for value in split.meta["val"]]
    return nest.element(source, (*at[:dim], at[dim].moved(sum(sizes[:number])), *at[dim + 1 :]))


def outer_product(nest: Nest, node: Node, at: Place) -> str:
    """A product over an inner dimension of size 1."""
    left, right = node.args
    row, i, j = at
    return f"{nest.element(left, (row, i, ZERO))} * {nest.element(right, (row, ZERO, j))}"


VIEWS: dict[Any, Rule] = {
    aten.expand.default: expanded,
    aten.slice.Tensor: sliced,
    aten.select.int: selected,
    aten.unsqueeze.default: unsqueezed,
    aten.squeeze.dim: squeezed,
    aten.squeeze.dims: squeezed,
    aten.transpose.int: permuted,
    aten.t.default: permuted,
    aten.permute.default: permuted,
    aten.flip.default: flipped,
    aten.unfold.default: windowed,
    aten.diagonal.default: diagonal,
    aten.view.default: viewed,
    aten._unsafe_view.default: viewed,
    aten.reshape.default: viewed,
    aten.alias.default: same,
    aten.detach.default: same,
    aten.clone.default: same,
}

# By one name in ATen and in C++.
_OF_THE_LIBRARY = """
    sqrt log log1p log2 log10 expm1 exp2 sin cos tan asin acos atan asinh acosh atanh erf erfc floor ceil
    trunc
"""

# Constants end in f, which float and double have exactly: one of type double would take float's loops with it.
_POINTWISE = {
    aten.mul.Tensor: "{0} * {1}",
    aten.mul.Scalar: "{0} * {1}",
    aten.div.Tensor: "(real){0} / {1}",
    aten.div.Scalar: "(real){0} / {1}",
    aten.neg.default: "-{0}",
    aten.abs.default: "std::fabs({0})",
    **dict.fromkeys((aten.sign.default, aten.sgn.default), "({0} > 0.0f ? 1.0f : {0} < 0.0f ? -1.0f : 0.0f)"),
    aten.reciprocal.default: "1.0f / {0}",
    aten.rsqrt.default: "1.0f / std::sqrt({0})",
    aten.exp.default: "exponential({0})",
    **{getattr(aten, name).default: f"std::{name}({{0}})" for name in _OF_THE_LIBRARY.split()},
    aten.atan2.default: "std::atan2({0}, {1})",
    aten.hypot.default: "std::hypot({0}, {1})",
    aten.copysign.Tensor: "std::copysign({0}, {1})",
    aten.fmod.Scalar: "std::fmod({0}, {1})",
    aten.remainder.Scalar: "modulo({0}, {1})",
    aten.isnan.default: "({0} != {0})",
    aten.isinf.default: "(std::fabs({0}) == INFINITY)",
    aten.isposinf.default: "({0} == INFINITY)",
    aten.isneginf.default: "({0} == -INFINITY)",
    aten.round.default: "std::nearbyint({0})",
    aten.heaviside.default: "({0} == 0.0f ? {1} : {0} > 0.0f ? 1.0f : 0.0f)",
    aten.tanh.default: "hyperbolic_tangent({0})",
    aten.sigmoid.default: "logistic({0})",
    aten.relu.default: "({0} < 0.0f ? 0.0f : {0})",
    aten.where.self: "({0} ? {1} : {2})",
    aten.maximum.default: "maximum({0}, {1})",
    aten.minimum.default: "minimum({0}, {1})",
    aten.clamp_min.Tensor: "maximum({0}, {1})",
    aten.clamp_max.Tensor: "minimum({0}, {1})",
    aten.logical_not.default: "!{0}",
    aten.bitwise_not.default: "!{0}",
    aten.logical_and.default: "({0} && {1})",
    aten.bitwise_and.Tensor: "({0} && {1})",
    aten.logical_or.default: "({0} || {1})",
    aten.bitwise_or.Tensor: "({0} || {1})",
    aten.logical_xor.default: "(!{0} != !{1})",
    aten.bitwise_xor.Tensor: "({0} != {1})",
    **{
        getattr(getattr(aten, name), kind): f"({{0}} {sign} {{1}})"
        for name, sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
        for kind in ("Tensor", "Scalar")
    },
}

COSTLY = {
    getattr(aten, name).default
    for name in ("tanh", "sigmoid", "exp", "log", "log1p", "expm1", "sin", "cos", "tan", "erf", "sqrt", "rsqrt", "atan")
} | {aten.div.Tensor, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor}

_RULES: dict[Any, Rule] = {
    **VIEWS,
    **{target: pointwise(template) for target, template in _POINTWISE.items()},
    aten.add.Tensor: scaled_sum("+"),
    aten.add.Scalar: scaled_sum("+"),
    aten.sub.Tensor: scaled_sum("-"),
    aten.sub.Scalar: scaled_sum("-"),
    aten.pow.Tensor_Scalar: power,
    aten.pow.Tensor_Tensor: power,
    aten.clamp.default: clamped,
    aten.clamp_min.default: clamped,
    aten._to_copy.default: cast,
    aten.full.default: constant(lambda node: node.args[1]),
    aten.full_like.default: constant(lambda node: node.args[1]),
    aten.scalar_tensor.default: constant(lambda node: node.args[0]),
    aten.zeros.default: constant(lambda node: 0),
    aten.zeros_like.default: constant(lambda node: 0),
    aten.ones.default: constant(lambda node: 1),
    aten.ones_like.default: constant(lambda node: 1),
    aten.bmm.default: outer_product,  # others are reductions
    aten.embedding.default: embedded,
    aten.gather.default: gathered,
    aten.index.Tensor: indexed,
    aten.arange.default: counted,
    aten.arange.start: counted,
    aten.arange.start_step: counted,
    aten.sum.dim_IntList: own_part,  # others are reductions
    operator.getitem: part_of_split,
}


def is_in_memory(node: Node) -> bool:
    """Whether reading a node's elements computes nothing."""
    while node.op == "call_function" and node.target in VIEWS:
        node = node.args[0]
    return node.op == "placeholder"
