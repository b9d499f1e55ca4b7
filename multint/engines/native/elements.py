"""What an element of an operation's result is, by elements of its arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from multint.engines.failures import RefusedError
from multint.engines.native.places import (
    ROW,
    Index,
    Node,
    Place,
    c_type,
    has_row,
    inner_dim,
    literal,
    shape_of,
)
from multint.engines.private import row_dimensions

aten = torch.ops.aten

Element = Callable[[Any, Place], str]  # the C++ name of an element of a value
Rule = Callable[[Element, fx.Node, Place], str]


def rule_of(node: Node) -> Rule:
    """What an element of a node is, which is no view.

    Raises: RefusedError for an operation without a rule.
    """
    found = _RULES.get(node.target)
    if found is None:
        operation = node.args[0].target if node.target is operator.getitem else node.target
        raise RefusedError(f"it has the operation {operation}, for which there is no rule")
    return found


def pointwise(template: str) -> Rule:
    """An operation on each number by itself, by its C++ with the numbers of its arguments in their places."""

    def rule(element: Element, node: Node, at: Place) -> str:
        return template.format(*(_operand(element, argument, at) for argument in node.args), type=c_type(node))

    return rule


def _operand(element: Element, argument: Any, at: Place) -> str:
    """The element of an argument that meets the element of the result: its shape is spread to the result's."""
    if isinstance(argument, fx.Node):
        if not isinstance(argument.meta.get("val"), Tensor):
            raise RefusedError("it computes with the number of rows")
        return element(argument, at[len(at) - len(shape_of(argument)) :])
    return literal(argument)


def _gathered(element: Element, node: Node, at: Place) -> str:
    """The element at the place of one dimension that an index of the same shape says."""
    source, dim, index = node.args[:3]
    inner_dim(source, dim)  # which no rows are along
    dim %= len(at)
    return element(source, (*at[:dim], _said(element(index, at)), *at[dim + 1 :]))


def _indexed(element: Element, node: Node, at: Place) -> str:
    """The element at the place of one dimension that an index says, whose dimensions take that one's place."""
    source, indices = node.args
    (dim, *others) = [d for d, index in enumerate(indices) if index is not None]
    if others:
        raise RefusedError(f"it has the operation {node.target} of several indices")
    inner_dim(source, dim)
    last = dim + len(shape_of(indices[dim]))
    return element(source, (*at[:dim], _said(element(indices[dim], at[dim:last])), *at[last:]))


def _said(number: str) -> Index:
    """A place that a number says."""
    return Index(((f"(int64_t){number}", 1),))


def _counted(element: Element, node: Node, at: Place) -> str:
    """`arange`: a place's own number."""
    start, step = (0, 1) if node.target is aten.arange.default else (node.args[0], (*node.args[2:], 1)[0])
    if has_row(node) or isinstance(start, fx.Node) or isinstance(step, fx.Node):
        raise RefusedError("it computes with the number of rows")
    return f"({c_type(node)})({at[0]}) * {literal(step)} + {literal(start)}"


def _constant(place: int) -> Rule:
    """The same number everywhere: an argument."""
    return lambda element, node, at: literal(node.args[place])


def _own_part(element: Element, node: Node, at: Place) -> str:
    """What a row gives to a sum over the rows: `check_sums` lets nothing but a sum of the results come of it."""
    source: Node = node.args[0]
    rows, count = row_dimensions(source.meta["val"]), len(shape_of(source))
    rest = iter(i for d, i in enumerate(at) if len(at) < count or d not in rows)
    return element(source, tuple(ROW if d in rows else next(rest) for d in range(count)))


def sums_rows(node: Node) -> bool:
    """Whether a node is a sum over the rows, and over nothing else."""
    if node.target is not aten.sum.dim_IntList:
        return False
    source: Node = node.args[0]
    return [d % len(shape_of(source)) for d in node.args[1]] == row_dimensions(source.meta["val"])


def check_sums(graph: fx.Graph, adds: list[bool]) -> None:
    """Raise unless a sum over the rows comes to nothing but results that each row adds its own part to.

    Only a derivative has such results. It is linear in what it is given, and so in each sum: the results of the parts
    add up to that of the sum.
    """
    sums: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and (sums_rows(node) or sums.intersection(node.all_input_nodes)):
            if not isinstance(node.meta["val"], Tensor) or has_row(node):
                raise RefusedError("it has the operation aten.sum.dim_IntList over the rows")
            sums.add(node)
    results: Any = graph.output_node().args[0]
    for node, add in zip(results, adds, strict=True):
        if not has_row(node) and not (add and node in sums):
            raise RefusedError("it has a result without rows that is no sum over the rows")


# By one name in ATen and in C++.
_OF_THE_LIBRARY = """
    sqrt log log1p log2 log10 expm1 exp2 sin cos tan asin acos atan asinh acosh atanh erf erfc floor ceil
    trunc
"""

# Constants end in f, which float and double have exactly: one of type double would take float's loops with it.
_POINTWISE = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), "{0} + {1}"),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), "{0} - {1}"),
    aten.mul.Tensor: "{0} * {1}",
    aten.mul.Scalar: "{0} * {1}",
    aten.div.Tensor: "(real){0} / {1}",
    aten.div.Scalar: "(real){0} / {1}",
    aten._to_copy.default: "({type})({0})",
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
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor), "std::pow({0}, {1})"),
    aten.clamp_min.default: "({0} < {1} ? {1} : {0})",
    aten.clamp_max.default: "({0} > {1} ? {1} : {0})",
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
    **{target: pointwise(template) for target, template in _POINTWISE.items()},
    aten.full.default: _constant(1),
    aten.full_like.default: _constant(1),
    aten.scalar_tensor.default: _constant(0),
    aten.gather.default: _gathered,
    aten.index.Tensor: _indexed,
    aten.arange.default: _counted,
    aten.arange.start: _counted,
    aten.arange.start_step: _counted,
    aten.sum.dim_IntList: _own_part,  # others are reductions
}
