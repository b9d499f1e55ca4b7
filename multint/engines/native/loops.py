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

from multint.engines.failures import RefusedError
from multint.engines.native.elements import COSTLY, check_sums, rule_of, sums_rows
from multint.engines.native.places import (
    ROW,
    ZERO,
    Index,
    Node,
    Place,
    View,
    c_type,
    check_rows,
    contiguous,
    has_row,
    inner,
    inner_dim,
    is_row,
    is_view,
    linear,
    literal,
    shape_of,
    view_of,
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
        graph: of operations on one type of numbers and bool that `kernel.plain` has made, every node with its "val".
        adds: for each result, whether it is added to what is there. A sum over the rows adds this row's part.

    Raises: RefusedError for what has no C++ here.
    """
    writer = _Writer(graph, list(adds))
    return RowFunction(writer.function(NAME), writer.scratch)


class _Store(NamedTuple):
    """What a loop writes: for every element of a row of a value, a place in memory."""

    node: Node  # whose elements are written, or some of them
    source: Node  # whose elements are taken
    target: str  # a name in C++
    reads: Sequence[Node]  # what its loop computes with
    level: int  # of its loop: all loops of a lower level come before it
    join: str = "="  # or "+=", "running +", "running *", or one of _JOINED
    dim: int = 0  # where a part stands, or what runs
    start: int = 0  # of a part
    reduced: tuple[int, ...] = ()  # the dimensions that a sum or an extreme goes over

    def place(self, at: Place) -> Index:
        """Where the element at a place of the source's row belongs."""
        if not self.reduced:
            dim = self.dim
            return contiguous(
                inner(self.node), (*at[:dim], *(i.moved(self.start) for i in at[dim : dim + 1]), *at[dim + 1 :])
            )
        kept = [dim for dim in range(len(at)) if dim not in self.reduced]
        return contiguous([inner(self.source)[dim] for dim in kept], tuple(at[dim] for dim in kept))


class _Nest:
    """Loops over one shape, and what is computed in them: each element once."""

    def __init__(self, writer: _Writer, shape: tuple[int, ...]) -> None:
        self.writer, self.shape = writer, shape
        self.known: dict[tuple[fx.Node, Place], str] = {}
        self.before: list[str] = []  # what is the same for all of the innermost loop
        self.inside: list[str] = []

    def element(self, node: Any, at: Place) -> str:
        """The C++ name of an element of a value."""
        if not isinstance(node, fx.Node):
            return literal(node)
        at = tuple(ZERO if size == 1 else i for i, size in zip(at, shape_of(node), strict=True))
        if any(is_row(size) and i != ROW for i, size in zip(at, shape_of(node), strict=True)):
            raise RefusedError("a row reads another one")
        if (node, at) not in self.known:
            stored = self.writer.stored.get(node)
            made = f"{stored}[{linear(node, at)}]" if stored else self.expression(node, at)
            self.known[node, at] = made if made.isidentifier() else self._named(made, node, at)
        return self.known[node, at]

    def expression(self, node: Node, at: Place) -> str:
        """The C++ of an element of a value that is in no memory yet."""
        if not is_view(node):
            return rule_of(node)(self.element, node, at)
        view = self.writer.view(node)
        place = view.place(at)
        if view.fits:
            return self.element(view.source, with_row(view.source, place))
        return f"{self.writer.stored[view.source]}[{contiguous(inner(view.source), place)}]"

    def _named(self, made: str, node: Node, at: Place) -> str:
        name = f"v{self.writer.count}"
        self.writer.count += 1
        innermost = f"i{len(self.shape) - 1}"
        varies = any(innermost == variable for index in at for variable, _ in index.terms)
        (self.inside if varies else self.before).append(f"const {c_type(node)} {name} = {made};")
        return name


class _Writer:
    """A piece on its way to C++: what is in memory, and the loops that bring it there.

    Attributes:
        stored: where a node's elements are in memory, by their name in C++.
        count: of the names given so far.
        scratch: numbers of one row's intermediate values.
    """

    def __init__(self, graph: fx.Graph, adds: list[bool]) -> None:
        self.graph, self.adds = graph, adds
        check_rows(graph)
        check_sums(graph, adds)
        self._views: dict[fx.Node, View] = {}
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        output: Any = graph.output_node()
        output.args = ([self._in_order(node) for node in output.args[0]],)
        graph.eliminate_dead_code()
        self.outputs: list[Node] = list(output.args[0])
        self.count = 0
        self.stored: dict[fx.Node, str] = {}
        self.scratch = 0
        self._stores: list[_Store] = []
        self._ready: dict[fx.Node, int] = {}
        self._memory: list[str] = []

    def view(self, node: Node) -> View:
        """A view, of which torch is asked once."""
        if node not in self._views:
            self._views[node] = view_of(node)
        return self._views[node]

    def _in_order(self, node: Node) -> Node:
        """What a node is a view of, where its numbers are in the same order."""
        while is_view(node) and self.view(node).in_order:
            node = self.view(node).source
        return node

    def function(self, name: str) -> str:
        """The C++ of a function of that name."""
        self._plan(set())
        # What is costly and stands in loops of several shapes or times is computed once, and kept.
        inlined = [((store.level, inner(store.source)), self._inlined(store)) for store in self._stores]
        costly = {node for node in self.graph.nodes if node.target in COSTLY}
        again = {node for node in costly if len({loop for loop, nodes in inlined if node in nodes}) > 1}
        if again:
            self._plan(again)
        arguments = [f"const {c_type(node)} *__restrict in{i}" for i, node in enumerate(self.inputs)]
        arguments += [f"{c_type(node)} *__restrict out{i}" for i, node in enumerate(self.outputs)]
        lines = [f"static inline void {name}({', '.join(arguments)}) {{", *self._memory]
        nests: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[_Store]] = defaultdict(list)
        for store in self._stores:
            nests[store.level, inner(store.source), store.reduced].append(store)
        for (_, shape, reduced), stores in sorted(nests.items(), key=lambda item: item[0][0]):
            lines += self._loops(shape, reduced, stores)
        return "\n".join([*lines, "}"])

    def _plan(self, kept: set[fx.Node]) -> None:
        """Decide what is in memory, and by which loops it comes there."""
        self.stored = {node: f"in{i}" for i, node in enumerate(self.inputs)}
        self._stores, self._memory, self.scratch, self._ready = [], [], 0, {}
        kept = kept.union(*map(self._kept_for, self.graph.nodes))
        final: dict[fx.Node, int] = {}
        for i, node in enumerate(self.outputs):
            if not self.adds[i] and has_row(node):
                final.setdefault(node, i)
        for node in self.graph.nodes:
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            if _is_made_of_parts(node) or node in kept:
                target = f"out{final[node]}" if node in final else self._take(node)
                self._make(node, target)
                self.stored[node] = target
        for i, node in enumerate(self.outputs):
            if self.stored.get(node) != f"out{i}":
                self._store(node, node, f"out{i}", [node], join="+=" if self.adds[i] else "=")

    def _kept_for(self, node: Node) -> set[fx.Node]:
        """What is to be in memory since a node would compute it again and again, or takes it from there."""
        if is_view(node) and isinstance(node.meta["val"], Tensor):
            return set() if self.view(node).fits else {self.view(node).source}
        if node.target is not aten.sum.dim_IntList or node.args[0].target is not aten.mul.Tensor:
            return set()
        # The sides of a product, which are spread over each other.
        sides = {self._in_order(side) for side in node.args[0].all_input_nodes}
        return {s for s in sides if math.prod(inner(s)) < math.prod(inner(node.args[0])) and self._is_computed(s)}

    def _is_computed(self, node: Node) -> bool:
        """Whether reading a node's elements computes anything."""
        while is_view(node):
            node = self.view(node).source
        return node.op == "call_function" and not _is_made_of_parts(node)

    def _take(self, node: Node) -> str:
        """Memory for a value of one row."""
        name, count = f"kept{len(self._memory)}", math.prod(inner(node))
        self.scratch += count
        self._memory.append(f"  {c_type(node)} {name}[{max(count, 1)}];")
        return name

    def _make(self, node: Node, target: str) -> None:
        """Bring a value into memory."""
        if not _is_made_of_parts(node):
            self._store(node, node, target, node.all_input_nodes)
        elif node.target is aten.cat.default:
            dim, start = inner_dim(node, (*node.args, 0)[1]), 0
            for part in node.args[0]:
                self._store(node, part, target, [part], dim=dim, start=start)
                start += inner(part)[dim]
        else:
            self._reduce(node, target, _JOINS[node.target], *node.args[:2])

    def _reduce(self, node: Node, target: str, join: str, source: Node, dims: Any = ()) -> None:
        """Bring what is joined of a row's numbers into memory, by some dimensions or, where none is named, by all."""
        dims = [dims] if isinstance(dims, int) else dims or range(len(shape_of(source)))
        if 0 in inner(source):
            raise RefusedError(f"it has the operation {node.target} of nothing")
        inside = tuple(sorted(inner_dim(source, dim) for dim in dims))
        where = {"dim": inside[0]} if join in _RUNNING else {"reduced": inside}
        self._store(node, source, target, [source], join=join, **where)

    def _store(self, node: Node, source: Node, target: str, reads: Sequence[Any], **how: Any) -> None:
        level = 1 + max([0, *map(self._ready_after, reads)])
        self._stores.append(_Store(node, source, target, reads, level, **how))

    def _ready_after(self, node: Node) -> int:
        """The level of loops after which a node's elements can be computed."""
        if node not in self._ready:
            levels = [store.level for store in self._stores if store.node is node and node in self.stored]
            self._ready[node] = max(levels or [0, *map(self._ready_after, node.all_input_nodes)])
        return self._ready[node]

    def _inlined(self, store: _Store) -> set[fx.Node]:
        """The nodes whose elements a store's loop computes."""
        found: set[fx.Node] = set()
        stack = list(store.reads)
        while stack:
            node = stack.pop()
            if node not in found and node not in self.stored:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def _loops(self, shape: tuple[int, ...], reduced: tuple[int, ...], stores: list[_Store]) -> Iterator[str]:
        """The C++ of loops over a shape that make some stores."""
        nest = _Nest(self, shape)
        at = tuple(Index(((f"i{d}", 1),)) for d in range(len(shape)))
        innermost = len(shape) - 1
        # A sum over the innermost loop stays in a register; one over an outer loop is added up in memory.
        in_registers = innermost in reduced
        sums, after, starts = [], [], []
        for store in stores:
            place = f"{store.target}[{store.place(at)}]"
            whole = with_row(store.source, at)
            is_made = self.stored.get(store.source) == store.target
            value = nest.expression(store.source, whole) if is_made else nest.element(store.source, whole)
            if store.join in _RUNNING:
                before = store.place((*at[: store.dim], at[store.dim].moved(-1), *at[store.dim + 1 :]))
                value = f"{at[store.dim]} == 0 ? {value} : {store.target}[{before}] {_RUNNING[store.join]} {value}"
            if store.join not in _JOINED:
                nest.inside.append(f"{place} {'+=' if store.join == '+=' else '='} {value};")
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
        in_order = any(store.join in _RUNNING for store in stores)
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
_RUNNING = {"running sum": "+", "running product": "*"}

# What no single expression says an element of.
_JOINS = {
    aten.cat.default: "=",
    aten.sum.dim_IntList: "sum",
    aten.prod.dim_int: "product",
    aten.amax.default: "max",
    aten.amin.default: "min",
    aten.cumsum.default: "running sum",
    aten.cumprod.default: "running product",
}


def _is_made_of_parts(node: Node) -> bool:
    return node.target in _JOINS and not sums_rows(node)
