"""From a step's graph to what is done once, what is done for all steps at once, and what is left in the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from multint.engines.trace import Trace

aten = torch.ops.aten


@dataclass
class Piece:
    """A part of the step: a function of some of the roots."""

    module: fx.GraphModule
    roots: list[fx.Node]  # its inputs, in order

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes of its own graph that are its results."""
        outputs: Any = self.module.graph.output_node().args[0]
        return list(outputs)

    def __call__(self, known: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """The results, from the roots' values."""
        return self.module(*(known[root] for root in self.roots))

    def operations(self) -> int:
        """How many operations it has."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


@dataclass
class Product:
    """The products of one left-hand side with loop-invariant matrices, done as one."""

    left: fx.Node  # (N, I)
    rights: list[fx.Node]  # (I, O) each
    packed: fx.Node  # a placeholder for the result (N, ΣO)
    piece: Piece | None = None  # computes `left`; None where that is a root itself

    def left_of(self, known: Mapping[fx.Node, Tensor]) -> Tensor:
        """The left-hand side, from the roots' values."""
        return known[self.left] if self.piece is None else self.piece(known)[0]

    def matrix(self, known: Mapping[fx.Node, Tensor]) -> Tensor:
        """The right-hand sides as one matrix (I, ΣO)."""
        rights = [known[right] for right in self.rights]
        return rights[0] if len(rights) == 1 else torch.cat(rights, dim=1)


@dataclass
class Plan:
    """How the engine runs a step; see the package's docstring."""

    trace: Trace
    prelude: Piece  # parameters → constants, once a call
    constants: list[fx.Node]
    hoisted: list[Product]
    streams: list[fx.Node]  # roots that change with t: inputs and hoisted products
    stages: list[Product]  # in the order in which they can be computed
    final: Piece  # roots → the new state
    output: Piece  # roots → the new state and, once more, its first field, which is the scan's output
    vectors: list[fx.Node]  # the constants that pieces read

    def bytes_per_row(self) -> int:
        """What a backward pass needs of one row of one step, beside the inputs and the states."""
        kept = [p.packed for p in [*self.hoisted, *self.stages]] + [s.left for s in self.stages if s.piece]
        return sum(torch.Size(n.meta["val"].shape[1:]).numel() * n.meta["val"].element_size() for n in kept)

    def describe(self, size: tuple[int, int], chunk: int) -> str:
        """The plan in words, for T steps of B rows, so many steps at a time."""
        steps, rows = size

        def width(node: fx.Node) -> str:
            return " × ".join(str(n) for n in node.meta["val"].shape[1:]) or "1"

        lines = [f"hoisted products: {len(self.hoisted)}"]
        lines += [
            f"  ({steps}·{rows} × {width(p.left)}) @ ({width(p.left)} × {width(p.packed)}), {len(p.rights)} in one"
            for p in self.hoisted
        ]
        lines += [f"streams: {len(self.streams)}"]
        for node in self.streams:
            value = node.meta["val"]
            count = steps * rows * torch.Size(value.shape[1:]).numel() * value.element_size()
            lines += [f"  ({steps}, {rows}, {width(node)}) {value.dtype}, {count / 2**20:.1f} MiB"]
        lines += [f"stages: {len(self.stages)}"]
        for stage in self.stages:
            source = f"a piece of {stage.piece.operations()} operations" if stage.piece else "a state"
            lines += [f"  {source} ({rows} × {width(stage.left)}) @ ({width(stage.left)} × {width(stage.packed)})"]
        lines += [f"new state: a piece of {self.final.operations()} operations, from {len(self.final.roots)} values"]
        kept = chunk * rows * self.bytes_per_row() / 2**20
        lines += [f"kept for the backward pass: {kept:.1f} MiB of streams and products"]
        if chunk < steps:
            lines += [
                f"more would not fit the budget: {-(-steps // chunk)} parts of {chunk} steps, each computed twice"
            ]
        return "\n".join(lines)


def plan(trace: Trace) -> Plan:
    """Classify, hoist, and cut the step into stages and pieces."""
    graph = trace.graph
    on_state, on_input = _reached(trace.states), _reached(trace.inputs)
    invariant = {n for n in graph.nodes if n.op != "output" and n not in on_state and n not in on_input}
    rows = trace.states[0].meta["val"].shape[0]
    hoisted = _products(graph, on_input - on_state, invariant, rows)
    stages = _products(graph, on_state, invariant, rows)
    trace.outputs = list(graph.output_node().args[0])  # type: ignore[arg-type]
    # What is the same at every step, as far as anything else reads it.
    rights = [right for product in hoisted + stages for right in product.rights]
    read = [n for n in graph.nodes if n in invariant and any(user not in invariant for user in n.users)]
    constants = list(dict.fromkeys([*rights, *read]))
    roots = {*trace.states, *trace.inputs, *constants, *(product.packed for product in hoisted + stages)}
    for product in hoisted + stages:
        if product.left not in trace.states and product.left not in trace.inputs:
            product.piece = extract(graph, roots, [product.left])
    final = extract(graph, roots, trace.outputs)
    used = {root for piece in [final, *(s.piece for s in stages if s.piece)] for root in piece.roots}
    return Plan(
        trace=trace,
        prelude=extract(graph, set(trace.invariants), constants),
        constants=constants,
        hoisted=hoisted,
        streams=[n for n in [*trace.inputs, *(p.packed for p in hoisted)] if n in used],
        stages=stages,
        final=final,
        output=extract(graph, roots, [*trace.outputs, trace.outputs[0]]),
        vectors=[n for n in constants if n in used],
    )


def extract(graph: fx.Graph, roots: set[fx.Node], outputs: list[fx.Node]) -> Piece:
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
    return Piece(fx.GraphModule(torch.nn.Module(), part), used)


def vjp(
    piece: Piece, wanted: Iterable[fx.Node], apart: set[fx.Node], mode: FakeTensorMode
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The piece's vector-Jacobian product, (roots, cotangents) → gradients, for those of the wanted roots it reads.

    Args:
        apart: vectors whose gradient is given for each row apart, (B, V), and not summed.
    """
    wanted = [root for root in wanted if root in piece.roots and root.meta["val"].is_floating_point()]
    places = [piece.roots.index(root) for root in wanted]
    outputs = piece.outputs
    # Where one value is two outputs, such as a state that a stage reads too, its cotangents add up.
    unique = [node for node in dict.fromkeys(outputs) if node.meta["val"].is_floating_point()]

    def function(*arguments: Any) -> Any:
        values, cotangents = list(arguments[: len(piece.roots)]), arguments[len(piece.roots) :]
        totals: dict[fx.Node, Any] = {}
        for node, cotangent in zip(outputs, cotangents, strict=True):
            totals[node] = totals[node] + cotangent if node in totals else cotangent

        def of(*some: Any) -> Any:
            for place, value in zip(places, some, strict=True):
                values[place] = value
            results = dict(zip(outputs, piece.module(*values), strict=True))
            return tuple(results[node] for node in unique)

        rows = cotangents[0].shape[0]
        for place, node in zip(places, wanted, strict=True):
            if node in apart:
                values[place] = values[place].expand(rows, -1)
        _, pull = torch.func.vjp(  # type: ignore[misc]
            of, *(values[place] for place in places)
        )
        return list(pull(tuple(totals[node] for node in unique)))

    with mode, enable_python_dispatcher():
        # Stand-ins of their own: a tensor that is two arguments would be traced as one.
        stand_ins = [torch.empty_like(node.meta["val"]) for node in [*piece.roots, *outputs]]
        module = make_fx(function, _allow_non_fake_inputs=True)(*stand_ins)
    return module, wanted


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


def has_rows(node: fx.Node, rows: Any) -> bool:
    """Whether a node's value has one row for each of the batch."""
    value = node.meta.get("val")
    first = value.shape[0] if isinstance(value, Tensor) and value.ndim else None
    return isinstance(first, torch.SymInt) and first.node.expr == rows.node.expr


def _products(graph: fx.Graph, among: set[fx.Node], invariant: set[fx.Node], rows: Any) -> list[Product]:
    """The products of nodes among the given ones with invariant matrices, grouped by their left-hand side."""
    grouped: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        is_product = node.target is aten.mm.default and node.args[0] in among and node.args[1] in invariant
        if is_product and has_rows(node, rows):
            grouped.setdefault(node.args[0], []).append(node)
    # A product's left-hand side may be another product, by now a packed one.
    return [
        Product(nodes[0].args[0], [node.args[1] for node in nodes], _pack(graph, nodes))  # type: ignore[arg-type, misc]
        for nodes in grouped.values()
    ]


def _pack(graph: fx.Graph, products: list[fx.Node]) -> fx.Node:
    """A placeholder for the products side by side, of which slices stand in their places from now on."""
    first = products[0]
    with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
        packed = graph.placeholder(f"{first.name}_packed")
    widths = [node.meta["val"].shape[1] for node in products]
    value = first.meta["val"]
    with value.fake_mode:
        packed.meta["val"] = value.new_empty((value.shape[0], sum(widths)))
    start = 0
    for node, width in zip(products, widths, strict=True):
        part = packed
        if len(products) > 1:
            with graph.inserting_before(node):
                part = graph.call_function(aten.slice.Tensor, (packed, 1, start, start + width))
            part.meta = dict(node.meta)
        start += width
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    return packed
