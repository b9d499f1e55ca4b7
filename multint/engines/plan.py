"""From a step's graph to what is done once, what is done for all steps at once, and what is left in the loop."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from multint.engines import private
from multint.engines.capture import Trace
from multint.engines.kernel import Kernel
from multint.engines.private import StandIns, has_rows

aten = torch.ops.aten


@dataclass
class Piece:
    """A part of the step: a function of some of the roots, the values that are there before it."""

    kernel: Kernel
    roots: list[fx.Node]  # its inputs, in order
    vjps: dict[Hashable, tuple[Kernel, list[int]]] = field(default_factory=dict)  # see `lowering.vjp`


@dataclass(eq=False)  # by identity
class Multiplication:
    """The products of one left-hand side with loop-invariant matrices, done as one."""

    left: fx.Node  # (N, I)
    matrix: fx.Node  # (I, ΣO), the matrices side by side
    result: fx.Node  # a placeholder for (N, ΣO)
    piece: Piece | None = None  # computes `left`; None where that is a root itself


@dataclass
class Plan:
    """What the operations of a step depend on, and so where they are done; see the package's docstring."""

    invariants: dict[str, fx.Node]  # the cell's tensors by name
    literals: dict[fx.Node, Tensor]
    inputs: dict[str, fx.Node]
    fields: list[fx.Node]  # of the state, in order
    states: dict[str, fx.Node]  # the first field, and those that a step changes
    unchanged: dict[str, fx.Node]  # the others, which it gives back as they came
    state_type: type
    world: StandIns
    rows: torch.SymInt  # of the batch
    # What is computed once a call, and by which pieces: of invariants alone, then of unchanged fields too, (B, ...).
    once: list[tuple[Piece, list[fx.Node]]]
    hoisted: list[Multiplication]  # of the inputs, which nothing but the loop reads
    early: list[Multiplication]  # of the inputs, which something before the loop reads
    stages: list[Multiplication]  # in the order in which they can be computed
    final: Piece  # roots → the new state
    streams: list[fx.Node]  # roots that change with t, and are there before the loop: inputs and early products
    vectors: list[fx.Node]  # the constants, unchanged fields and lasting values that pieces read
    by_row: set[fx.Node]  # the vectors of which each row of the batch has a gradient (V,)
    may_learn: set[fx.Node]  # what depends on the inputs or on tensors that want gradients


def plan(trace: Trace) -> Plan:
    """Classify, hoist, and cut the step into stages and pieces. The trace stays as it is."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in trace.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    invariants, inputs, states = (
        {name: copies[node] for name, node in group.items()} for group in (trace.invariants, trace.inputs, trace.states)
    )
    literals = {copies[node]: value for node, value in trace.literals.items()}
    rows = next(iter(states.values())).meta["val"].shape[0]
    new: Any = graph.output_node().args[0]
    # The first field is the output, which has a value for each step in any case.
    unchanged = {name: node for i, (name, node) in enumerate(states.items()) if i and new[i] is node}
    _own_counts(graph, rows)
    on_state, on_input = _reached(states.values()), _reached(inputs.values())
    invariant = {n for n in graph.nodes if n.op != "output" and n not in on_state and n not in on_input}
    changing = {*states.values()}.difference(unchanged.values())
    lasts = _reached(unchanged.values()) - _reached({*inputs.values(), *changing})
    in_loop = on_state - lasts
    hoisted = _products(graph, on_input - in_loop, invariant, rows, trace.world)
    stages = _products(graph, in_loop, invariant, rows, trace.world)
    new = graph.output_node().args[0]
    outputs = [value for name, value in zip(states, new, strict=True) if name not in unchanged]
    # What is the same at every step, as far as anything else reads it.
    read = [n for n in graph.nodes if n in invariant and any(user not in invariant for user in n.users)]
    constants = list(dict.fromkeys([*(product.matrix for product in hoisted + stages), *read]))
    computed = [node for node in constants if node.op != "placeholder"]
    lasting = _read_of(graph, lasts, rows)
    piece = partial(_extract, graph, trace.world)
    results = [product.result for product in hoisted + stages]
    roots = {*states.values(), *inputs.values(), *constants, *results, *lasting}
    for product in hoisted + stages:
        if product.left not in roots:
            product.piece = piece(roots, [product.left])
    read_before = {root for product in hoisted for root in (product.piece.roots if product.piece else [product.left])}
    early = [product for product in hoisted if product.result in read_before]
    hoisted = [product for product in hoisted if product.result not in read_before]
    final = piece(roots, outputs)
    used = {root for part in [final, *(s.piece for s in stages if s.piece)] for root in part.roots}
    learnt = [invariants[name] for name in trace.learnt]
    vectors = [n for n in [*constants, *unchanged.values(), *lasting] if n in used]
    return Plan(
        invariants=invariants,
        literals=literals,
        inputs=inputs,
        fields=list(states.values()),
        states={name: node for name, node in states.items() if name not in unchanged},
        unchanged=unchanged,
        state_type=trace.state_type,
        world=trace.world,
        rows=rows,
        once=[
            (piece({*invariants.values(), *literals}, computed), computed),
            (piece({*constants, *unchanged.values()}, lasting), lasting),
        ],
        hoisted=hoisted,
        early=early,
        stages=stages,
        final=final,
        streams=[n for n in [*inputs.values(), *(p.result for p in early)] if n in used],
        vectors=vectors,
        by_row={n for n in vectors if _is_by_row(n, rows)},
        may_learn=_reached([*inputs.values(), *unchanged.values(), *learnt, *(p.result for p in early)]),
    )


def _extract(graph: fx.Graph, world: StandIns, roots: set[fx.Node], outputs: list[fx.Node]) -> Piece:
    """The part of the graph between the roots and the outputs, as a function of the roots it needs."""
    needed: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in roots:
                stack.extend(node.all_input_nodes)
    part, copies = fx.Graph(), {}
    used = [node for node in graph.nodes if node in needed and node in roots]
    for node in used:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in graph.nodes:
        if node in needed and node not in roots:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in outputs])
    return Piece(Kernel(fx.GraphModule(torch.nn.Module(), part), world), used)


def _is_by_row(vector: fx.Node, rows: torch.SymInt) -> bool:
    """Whether all that reads a vector meets its entries with the columns of a matrix of rows."""
    alike = [private.is_pointwise(n.target) and n.meta["val"].ndim == 2 for n in vector.users]
    own = vector.meta["val"]
    return (
        own.ndim == 1
        and not has_rows(own, rows)
        and all(alike)
        and all(has_rows(n.meta["val"], rows) for n in vector.users)
    )


def _reached(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on any of the sources, themselves included."""
    reached: set[fx.Node] = set()
    stack = list(sources)
    while stack:
        node = stack.pop()
        if node not in reached and node.op != "output":
            reached.add(node)
            stack.extend(node.users)
    return reached


def _own_counts(graph: fx.Graph, rows: torch.SymInt) -> None:
    """Let each operation ask its own tensor for the number of rows, where the tracer has asked any of them.

    So a view of one tensor's rows does not depend on another tensor.
    """
    for node in list(graph.nodes):
        own = next((n for n in node.all_input_nodes if has_rows(n.meta.get("val"), rows)), None)
        for count in node.all_input_nodes if own and node.op == "call_function" else ():
            is_count = count.target is aten.sym_size.int and count.meta["val"].node.expr == rows.node.expr
            if is_count and count.args[0] is not own:
                with graph.inserting_before(node):
                    asked = graph.call_function(aten.sym_size.int, (own, 0))
                asked.meta["val"] = rows
                node.replace_input_with(count, asked)


def _read_of(graph: fx.Graph, lasts: set[fx.Node], rows: torch.SymInt) -> list[fx.Node]:
    """Those of the lasting nodes that are computed before the loop: what others read of them, but for views."""
    found, stack = set[fx.Node](), [n for n in lasts if any(user not in lasts for user in n.users)]
    while stack:
        node = stack.pop()
        if node.op == "placeholder" or node in found:
            continue
        if private.is_operation(node.target) and not private.is_view(node.target) and has_rows(node.meta["val"], rows):
            found.add(node)
        else:
            stack.extend(lasts.intersection(node.all_input_nodes))
    return [node for node in graph.nodes if node in found]


def _products(
    graph: fx.Graph, among: set[fx.Node], invariant: set[fx.Node], rows: torch.SymInt, world: StandIns
) -> list[Multiplication]:
    """The products of nodes among the given ones with invariant matrices, grouped by their left-hand side.

    A product counts where it has one row for each of the batch.
    """
    grouped: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        is_product = node.target is aten.mm.default and node.args[0] in among and node.args[1] in invariant
        if is_product and has_rows(node.meta["val"], rows):
            grouped.setdefault(node.args[0], []).append(node)
    # One after the other: a product's left-hand side may be another product, by now a packed one.
    return [_packed(graph, nodes, invariant, world) for nodes in grouped.values()]


def _packed(graph: fx.Graph, products: list[fx.Node], invariant: set[fx.Node], world: StandIns) -> Multiplication:
    """The products as one, of which slices stand in their places from now on."""
    first = products[0]
    with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
        result = graph.placeholder(f"{first.name}_packed")
    widths = [node.meta["val"].shape[1] for node in products]
    matrices: list[fx.Node] = [node.args[1] for node in products]  # type: ignore[misc]
    matrix, left, value = matrices[0], first.args[0], first.meta["val"]
    result.meta["val"] = world.new(value, (value.shape[0], sum(widths)))
    if len(products) > 1:
        with graph.inserting_before(products[-1]):
            matrix = graph.call_function(aten.cat.default, (matrices, 1))
        matrix.meta["val"] = world.new(value, (matrices[0].meta["val"].shape[0], sum(widths)))
        invariant.add(matrix)
    start = 0
    for node, width in zip(products, widths, strict=True):
        part = result
        if len(products) > 1:
            with graph.inserting_before(node):
                columns = graph.call_function(aten.slice.Tensor, (result, 1, start, start + width))
                columns.meta = dict(node.meta)
                # What was traced may take the product for contiguous, as a view does that folds rows with what follows.
                part = graph.call_function(aten.clone.default, (columns,), {"memory_format": torch.contiguous_format})
            part.meta = dict(node.meta)
        start += width
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    return Multiplication(left, matrix, result)  # type: ignore[arg-type]
