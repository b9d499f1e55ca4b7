"""What an element of an operation's result is, by elements of its arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from multint.engines.cpp_values import (
    ZERO,
    At,
    Index,
    Node,
    c_type,
    contiguous,
    inner,
    literal,
    shape_of,
    with_row,
)
from multint.engines.failures import RefusedError
from multint.engines.private import row_dimensions

if TYPE_CHECKING:
    from multint.engines.cpp import Nest

aten = torch.ops.aten

Rule = Callable[["Nest", fx.Node, At], str]


def rule_of(node: Node) -> Rule:
    """What an element of a node is.

    Raises: RefusedError for an operation without a rule, or of another dtype.
    """
    found = _RULES.get(node.target) if node.op == "call_function" else None
    if found is None:
        raise RefusedError(f"it has the operation {node.target}")
    c_type(node)
    return found


def operand(nest: Nest, node: Node, argument: Any, at: At) -> str:
    """The element of an argument that meets the node's element: its shape is spread to the node's."""
    if not isinstance(argument, fx.Node):
        return literal(argument)
    if not isinstance(argument.meta.get("val"), Tensor):
        raise RefusedError("it computes with the number of rows")
    count = len(shape_of(argument))
    return nest.element(argument, at[len(at) - count :] if count else ())


def pointwise(template: str) -> Rule:
    """An operation on each number by itself, by its C++ with the numbers of its arguments in their places."""

    def rule(nest: Nest, node: Node, at: At) -> str:
        if node.kwargs.get("rounding_mode"):
            raise RefusedError(f"it has the operation {node.target} with rounding")
        values = [operand(nest, node, argument, at) for argument in node.args]
        alpha = node.kwargs.get("alpha", 1)
        return template.format(*values, alpha=literal(alpha))

    return rule


def scaled_sum(sign: str) -> Rule:
    """A sum or a difference, whose second term may have a factor."""

    def rule(nest: Nest, node: Node, at: At) -> str:
        left, right = (operand(nest, node, argument, at) for argument in node.args[:2])
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        return f"{left} {sign} {right}" if alpha == 1 else f"{left} {sign} {literal(alpha)} * {right}"

    return rule


def power(nest: Nest, node: Node, at: At) -> str:
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


def clamped(nest: Nest, node: Node, at: At) -> str:
    """A number within bounds."""
    value, low, high = [operand(nest, node, a, at) if a is not None else None for a in (*node.args, None, None)][:3]
    if "NAN" in (low, high):
        return "NAN"
    value = value if low is None else f"({value} < {low} ? {low} : {value})"
    return str(value) if high is None else f"({value} > {high} ? {high} : {value})"


def constant(value: Callable[[fx.Node], Any]) -> Rule:
    """The same number everywhere."""
    return lambda nest, node, at: literal(value(node))


def same(nest: Nest, node: Node, at: At) -> str:
    """The argument's own element."""
    return nest.element(node.args[0], at)


def cast(nest: Nest, node: Node, at: At) -> str:
    """The element in another type."""
    return f"({c_type(node)})({nest.element(node.args[0], at)})"


def expanded(nest: Nest, node: Node, at: At) -> str:
    """The element of what is spread over new or wider dimensions."""
    return operand(nest, node, node.args[0], at)


def sliced(nest: Nest, node: Node, at: At) -> str:
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


def selected(nest: Nest, node: Node, at: At) -> str:
    """An element at a fixed place of one dimension."""
    source, dim, place = node.args
    size = shape_of(source)
    dim = dim % len(size)
    if isinstance(size[dim], torch.SymInt):
        raise RefusedError("it selects a row")
    return nest.element(source, (*at[:dim], Index((), place % size[dim]), *at[dim:]))


def unsqueezed(nest: Nest, node: Node, at: At) -> str:
    """The element without a new dimension of size 1."""
    dim = node.args[1] % len(at)
    return nest.element(node.args[0], (*at[:dim], *at[dim + 1 :]))


def squeezed(nest: Nest, node: Node, at: At) -> str:
    """The element with the dimensions of size 1 that were taken out."""
    source: Node = node.args[0]
    size = shape_of(source)
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    gone = {d % len(size) for d in dims if not isinstance(size[d], torch.SymInt) and size[d] == 1}
    rest = iter(at)
    return nest.element(source, tuple(ZERO if d in gone else next(rest) for d in range(len(size))))


def permuted(nest: Nest, node: Node, at: At) -> str:
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


def viewed(nest: Nest, node: Node, at: At) -> str:
    """The same memory by other dimensions, or dimensions of size 1 more or fewer."""
    source: Node = node.args[0]
    if any(row_dimensions(value.meta["val"]) not in ([], [0]) for value in (source, node)):
        raise RefusedError("it arranges the rows anew")
    place = contiguous(inner(node), at[len(at) - len(inner(node)) :])
    if source in nest.piece.stored:
        return f"{nest.piece.stored[source]}[{place}]"
    sizes = [index for index, size in zip(at[len(at) - len(inner(node)) :], inner(node), strict=True) if size > 1]
    rest = iter(sizes)
    return nest.element(source, with_row(source, tuple(next(rest) if n > 1 else ZERO for n in inner(source))))


def is_rearranged(node: Node) -> bool:
    """Whether a view has other dimensions than its source, but for those of size 1."""
    source = node.args[0]
    return [n for n in inner(node) if n != 1] != [n for n in inner(source) if n != 1]


def part_of_split(nest: Nest, node: Node, at: At) -> str:
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


def outer_product(nest: Nest, node: Node, at: At) -> str:
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
    aten.view.default: viewed,
    aten._unsafe_view.default: viewed,
    aten.reshape.default: viewed,
    aten.alias.default: same,
    aten.detach.default: same,
    aten.clone.default: same,
}

_POINTWISE = {
    aten.mul.Tensor: "{0} * {1}",
    aten.mul.Scalar: "{0} * {1}",
    aten.div.Tensor: "(float){0} / {1}",
    aten.div.Scalar: "(float){0} / {1}",
    aten.neg.default: "-{0}",
    aten.abs.default: "std::fabs({0})",
    **dict.fromkeys((aten.sign.default, aten.sgn.default), "({0} > 0.0f ? 1.0f : {0} < 0.0f ? -1.0f : 0.0f)"),
    aten.reciprocal.default: "1.0f / {0}",
    aten.sqrt.default: "std::sqrt({0})",
    aten.rsqrt.default: "1.0f / std::sqrt({0})",
    aten.exp.default: "exponential({0})",
    aten.log.default: "std::log({0})",
    aten.log1p.default: "std::log1p({0})",
    aten.expm1.default: "std::expm1({0})",
    aten.sin.default: "std::sin({0})",
    aten.cos.default: "std::cos({0})",
    aten.erf.default: "std::erf({0})",
    aten.tanh.default: "hyperbolic_tangent({0})",
    aten.sigmoid.default: "logistic({0})",
    aten.relu.default: "({0} < 0.0f ? 0.0f : {0})",
    aten.where.self: "({0} ? {1} : {2})",
    aten.maximum.default: "maximum({0}, {1})",
    aten.minimum.default: "minimum({0}, {1})",
    aten.logical_not.default: "!{0}",
    aten.bitwise_not.default: "!{0}",
    aten.logical_and.default: "({0} && {1})",
    aten.bitwise_and.Tensor: "({0} && {1})",
    aten.logical_or.default: "({0} || {1})",
    aten.bitwise_or.Tensor: "({0} || {1})",
    **{
        getattr(getattr(aten, name), kind): f"({{0}} {sign} {{1}})"
        for name, sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
        for kind in ("Tensor", "Scalar")
    },
}

COSTLY = {
    getattr(aten, name).default
    for name in ("tanh", "sigmoid", "exp", "log", "log1p", "expm1", "sin", "cos", "erf", "sqrt", "rsqrt")
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
    operator.getitem: part_of_split,
}


def is_in_memory(node: Node) -> bool:
    """Whether reading a node's elements computes nothing."""
    while node.op == "call_function" and node.target in VIEWS:
        node = node.args[0]
    return node.op == "placeholder"
