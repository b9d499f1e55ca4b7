"""A piece of a step as C++: one function for one row, whose loops the compiler turns into vector code.

A piece is row-wise, so each of its values is, in one row, a small array, and an operation says what an element of the
array is: the element (i) of `x + v` is `x[i] + v[i]`, of a slice from 8 it is the element (i + 8) of what is sliced.
Most values are written nowhere: where an element is stored, its expression is followed down to what is in memory.
In memory are the arguments, and what would be computed again and again otherwise: sums, the sides of products, parts
that are put together, and costly values that several loops read. One loop makes all that has one shape and is ready at
one time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from multint.engines.native.elements import (
    COSTLY,
    VIEWS,
    check_sums,
    is_in_memory,
    is_rearranged,
    rule_of,
    squeezed,
    unsqueezed,
    viewed,
)
from multint.engines.native.parts import PARTS, is_made_of_parts, whole
from multint.engines.native.values import (
    ZERO,
    Index,
    Node,
    Place,
    Store,
    c_type,
    check_rows,
    contiguous,
    has_row,
    inner,
    linear,
    literal,
    shape_of,
    with_row,
)

aten = torch.ops.aten

NAME = "NAME_OF_THE_PIECE"  # to be replaced: equal pieces have equal texts


class RowFunction(NamedTuple):
    """C++ of a function of one row, and how many numbers it puts on the stack."""

    text: str
    scratch: int


def function_of(graph: fx.Graph, adds: Sequence[bool]) -> RowFunction:
    """A piece as a C++ function of one row: pointers to the row of each argument, then to that of each result.

    Args:
        graph: of operations on one type of numbers and bool that `private.plain` has made, every node with its "val".
        adds: for each result, whether it is added to what is there. A sum over the rows adds this row's part.

    Raises: RefusedError for what has no C++ here.
    """
    writer = _Writer(graph, list(adds))
    return RowFunction(writer.function(NAME), writer.scratch)


class _Nest:
    """Loops over one shape, and what is computed in them: each element once."""

    def __init__(self, writer: _Writer, shape: tuple[int, ...]) -> None:
        self.writer, self.shape = writer, shape
        self.known: dict[tuple[fx.Node, Place], str] = {}
        self.before: list[str] = []  # what is the same for all of the innermost loop
        self.inside: list[str] = []

    @property
    def stored(self) -> dict[fx.Node, str]:
        """Where nodes' elements are in memory."""
        return self.writer.stored

    def element(self, node: Any, at: Place) -> str:
        """The C++ name of an element of a node's value."""
        if not isinstance(node, fx.Node):
            return literal(node)
        at = tuple(ZERO if size == 1 else i for i, size in zip(at, shape_of(node), strict=True))
        if (node, at) not in self.known:
            stored = self.writer.stored.get(node)
            made = f"{stored}[{linear(node, at)}]" if stored else rule_of(node)(self, node, at)
            self.known[node, at] = self._named(made, node, at)
        return self.known[node, at]

    def _named(self, made: str, node: Node, at: Place) -> str:
        if made.isidentifier():
            return made
        name = f"v{self.writer.count}"
        self.writer.count += 1
        innermost = f"i{len(self.shape) - 1}"
        varies = any(innermost == variable for index in at for variable, _ in index.terms)
        (self.inside if varies else self.before).append(f"const {c_type(node)} {name} = {made};")
        return name


def _in_order(node: Node) -> Node:
    """What a result views, where its numbers are in the same order."""
    while VIEWS.get(node.target) in (viewed, unsqueezed, squeezed):
        node = node.args[0]
    return node


class _Writer:
    """A piece on its way to C++: what is in memory, and the loops that bring it there.

    Attributes:
        stored: where a node's elements are in memory, by their name in C++.
        stores: what the loops write.
        count: of the names given so far.
        scratch: numbers of one row's intermediate values.
    """

    def __init__(self, graph: fx.Graph, adds: list[bool]) -> None:
        self.graph, self.adds = graph, adds
        check_rows(graph)
        check_sums(graph, adds)
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        output: Any = graph.output_node()
        output.args = ([_in_order(node) for node in output.args[0]],)
        graph.eliminate_dead_code()
        self.outputs: list[Node] = list(output.args[0])
        self.count = 0  # of names
        self.stored: dict[fx.Node, str] = {node: f"in{i}" for i, node in enumerate(self.inputs)}
        self.stores: list[Store] = []
        self.scratch = 0
        self._ready: dict[fx.Node, int] = {}
        self._memory: list[str] = []

    def function(self, name: str) -> str:
        costly = self._costly()
        self._plan(set())
        # What is costly and stands in loops of several shapes or times is computed once, and kept.
        inlined = [((store.level, store.shape), self._inlined(store)) for store in self.stores]
        again = {node for node in costly if len({loop for loop, nodes in inlined if node in nodes}) > 1}
        if again:
            self._plan(again)
        arguments = [f"const {c_type(node)} *__restrict in{i}" for i, node in enumerate(self.inputs)]
        arguments += [f"{c_type(node)} *__restrict out{i}" for i, node in enumerate(self.outputs)]
        lines = [f"static inline void {name}({', '.join(arguments)}) {{", *self._memory]
        nests: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[Store]] = defaultdict(list)
        for store in self.stores:
            nests[store.level, store.shape, store.reduced].append(store)
        for (_, shape, reduced), stores in sorted(nests.items(), key=lambda item: item[0][0]):
            lines += self._loops(shape, reduced, stores)
        return "\n".join([*lines, "}"])

    def _costly(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target in COSTLY]

    def _plan(self, kept: set[fx.Node]) -> None:
        """Decide what is in memory, and by which loops it comes there."""
        self.stored = {node: f"in{i}" for i, node in enumerate(self.inputs)}
        self.stores, self._memory, self.scratch, self._ready = [], [], 0, {}
        for node in self.graph.nodes:
            if node.target is aten.bmm.default:
                kept |= {side for side in node.all_input_nodes if not is_in_memory(side)}
            elif VIEWS.get(node.target) is viewed and is_rearranged(node):
                kept.add(node.args[0])
        final: dict[fx.Node, int] = {}
        for i, node in enumerate(self.outputs):
            if not self.adds[i] and has_row(node):
                final.setdefault(node, i)
        for node in self.graph.nodes:
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            if is_made_of_parts(node) or node in kept:
                target = f"out{final[node]}" if node in final else self._take(node)
                (PARTS[node.target] if is_made_of_parts(node) else whole)(self, node, target)
                self.stored[node] = target
        for i, node in enumerate(self.outputs):
            if self.stored.get(node) != f"out{i}":
                self._give(i, node)

    def _take(self, node: Node) -> str:
        """Memory for a value of one row."""
        name, count = f"kept{len(self._memory)}", math.prod(inner(node))
        self.scratch += count
        self._memory.append(f"  {c_type(node)} {name}[{max(count, 1)}];")
        return name

    def ready(self, node: Any) -> int:
        """The level of loops after which a node's elements can be computed."""
        if not isinstance(node, fx.Node):
            return 0
        if node not in self._ready:
            levels = [store.level for store in self.stores if store.node is node and node in self.stored]
            self._ready[node] = max(levels) if levels else max([0, *map(self.ready, node.all_input_nodes)])
        return self._ready[node]

    def level_after(self, nodes: Sequence[Any]) -> int:
        """The first level of loops at which all of these can be read."""
        return 1 + max([0, *map(self.ready, nodes)])

    def _inlined(self, store: Store) -> set[fx.Node]:
        """The nodes whose elements a store's loop computes."""
        found: set[fx.Node] = set()
        stack = list(store.sources)
        while stack:
            node = stack.pop()
            if node not in found and node not in self.stored:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def _give(self, i: int, node: Node) -> None:
        """Write a result, or add it to what is there."""
        shape = inner(node)
        self.stores.append(
            Store(
                node,
                [node],
                f"out{i}",
                shape,
                (),
                self.level_after([node]),
                lambda nest, at: nest.element(node, with_row(node, at)),
                lambda at: contiguous(shape, at),
                "+=" if self.adds[i] else "=",
            )
        )

    def _loops(self, shape: tuple[int, ...], reduced: tuple[int, ...], stores: list[Store]) -> Iterator[str]:
        """The C++ of loops over a shape that make some stores."""
        nest = _Nest(self, shape)
        at = tuple(Index(((f"i{d}", 1),)) for d in range(len(shape)))
        innermost = len(shape) - 1
        # A sum over the innermost loop stays in a register; one over an outer loop is added up in memory.
        in_registers = innermost in reduced
        sums, after, starts = [], [], []
        for store in stores:
            value, place = store.value(nest, at), f"{store.target}[{store.place(at)}]"
            if store.join in ("=", "+=", "in order"):
                nest.inside.append(f"{place} {store.join.replace('in order', '=')} {value};")
                continue
            start, joined = _JOINED[store.join]
            if in_registers:
                name = f"s{self.count}"
                self.count += 1
                sums.append((store.join, name))
                starts.append(f"{c_type(store.node)} {name} = {start};")
                nest.inside.append(f"{name} = {joined.format(name, value)};")
                # Loops outside of the innermost may belong to the same sum.
                outer = [d for d in reduced if d != innermost]
                if outer:
                    first = " && ".join(f"i{d} == 0" for d in outer)
                    after.append(f"{place} = {first} ? {name} : {joined.format(place, name)};")
                else:
                    after.append(f"{place} = {name};")
            else:
                first = " && ".join(f"i{d} == 0" for d in reduced)
                nest.inside.append(f"{place} = {first} ? {value} : {joined.format(place, value)};")
        if not shape:
            yield from (f"  {line}" for line in ["{", *nest.before, *nest.inside, "}"])
            return
        for d, size in enumerate(shape[:-1]):
            yield f"  {'  ' * d}for (int64_t i{d} = 0; i{d} < {size}; ++i{d}) {{"
        indent = "  " * len(shape)
        if innermost == 0:
            yield "  {"
        yield from (f"{indent}  {line}" for line in [*nest.before, *starts])
        clauses = "".join(f" reduction(+:{name})" for _, name in sums)
        in_order = any(store.join == "in order" for store in stores)
        if not in_order and all(join == "sum" for join, _ in sums):  # the order of a maximum matters with NaNs
            yield "#pragma omp simd" + clauses
        yield f"{indent}  for (int64_t i{innermost} = 0; i{innermost} < {shape[-1]}; ++i{innermost}) {{"
        yield from (f"{indent}    {line}" for line in nest.inside)
        yield f"{indent}  }}"
        yield from (f"{indent}  {line}" for line in after)
        yield "  " + "} " * max(1, len(shape) - 1)


_JOINED = {
    "sum": ("0.0f", "{0} + {1}"),
    "product": ("1.0f", "{0} * {1}"),
    "max": ("-INFINITY", "maximum({0}, {1})"),
    "min": ("INFINITY", "minimum({0}, {1})"),
}
