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
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from multint.engines.failures import RefusedError
from multint.engines.private import row_dimensions

aten = torch.ops.aten

_MOST_SCRATCH = 2**15  # numbers of one row's intermediate values, which lie on a thread's stack


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
At = tuple[Index, ...]
Node = Any  # an fx.Node, whose arguments have no types of use


class Store(NamedTuple):
    """What a loop writes: for every element of a node, or of a reduction's operand, a place in memory."""

    node: Node
    sources: list[fx.Node]  # what its loop reads of
    target: str  # a name in C++
    shape: tuple[int, ...]  # of the loops, without the row
    reduced: tuple[int, ...]  # the loops that a sum or a maximum goes over
    level: int
    value: Callable[[_Nest, At], str]  # the element at the loops' variables
    place: Callable[[At], Index]
    join: str  # "=", "+=" or, for reductions, "sum" and "max"


NAME = "NAME_OF_THE_PIECE"  # to be replaced: equal pieces have equal texts


def function_of(graph: fx.Graph, adds: Sequence[bool]) -> str:
    """A piece as a C++ function of one row: pointers to the row of each argument, then to that of each result.

    Args:
        graph: of operations on float32 and bool that `decompositions` has made plain, every node with its "val".
        adds: for each result, whether it is added to what is there. A sum over the rows adds this row's part.

    Raises: RefusedError for what has no C++ here.
    """
    return _Piece(graph, list(adds)).function(NAME)


class _Nest:
    """Loops over one shape, and what is computed in them: each element once."""

    def __init__(self, piece: _Piece, shape: tuple[int, ...]) -> None:
        self.piece, self.shape = piece, shape
        self.known: dict[tuple[fx.Node, At], str] = {}
        self.before: list[str] = []  # what is the same for all of the innermost loop
        self.inside: list[str] = []

    def element(self, node: Any, at: At) -> str:
        """The C++ name of an element of a node's value."""
        if not isinstance(node, fx.Node):
            return literal(node)
        at = tuple(ZERO if size == 1 else i for i, size in zip(at, shape_of(node), strict=True))
        if (node, at) not in self.known:
            stored = self.piece.stored.get(node)
            made = f"{stored}[{linear(node, at)}]" if stored else rule_of(node)(self, node, at)
            self.known[node, at] = self._named(made, node, at)
        return self.known[node, at]

    def _named(self, made: str, node: Node, at: At) -> str:
        if made.isidentifier():
            return made
        name = f"v{self.piece.count}"
        self.piece.count += 1
        innermost = f"i{len(self.shape) - 1}"
        varies = any(innermost == variable for index in at for variable, _ in index.terms)
        (self.inside if varies else self.before).append(f"const {c_type(node)} {name} = {made};")
        return name


class _Piece:
    def __init__(self, graph: fx.Graph, adds: list[bool]) -> None:
        self.graph, self.adds = graph, adds
        _check_rows(graph)
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.outputs: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.count = 0  # of names
        self.stored: dict[fx.Node, str] = {node: f"in{i}" for i, node in enumerate(self.inputs)}
        self.stores: list[Store] = []
        self._scratch = 0
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
        if self._scratch > _MOST_SCRATCH:
            raise RefusedError(f"a row's intermediate values are {self._scratch} numbers")
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
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target in _COSTLY]

    def _plan(self, kept: set[fx.Node]) -> None:
        """Decide what is in memory, and by which loops it comes there."""
        self.stored = {node: f"in{i}" for i, node in enumerate(self.inputs)}
        self.stores, self._memory, self._scratch, self._ready = [], [], 0, {}
        for node in self.graph.nodes:
            if node.target is aten.bmm.default:
                kept |= {side for side in node.all_input_nodes if not _is_in_memory(side)}
            elif _VIEWS.get(node.target) is viewed and not sums_rows(node.args[0]) and _is_rearranged(node):
                kept.add(node.args[0])
        final: dict[fx.Node, int] = {}
        for i, node in enumerate(self.outputs):
            if not self.adds[i] and has_row(node):
                final.setdefault(node, i)
        for node in self.graph.nodes:
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or sums_rows(node):
                continue
            if _is_made_of_parts(node) or node in kept:
                target = f"out{final[node]}" if node in final else self._take(node)
                (_PARTS[node.target] if _is_made_of_parts(node) else whole)(self, node, target)
                self.stored[node] = target
        for i, node in enumerate(self.outputs):
            if self.stored.get(node) != f"out{i}":
                self._give(i, node)

    def _take(self, node: Node) -> str:
        """Memory for a value of one row."""
        name, count = f"kept{len(self._memory)}", math.prod(inner(node))
        self._scratch += count
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
        over_rows = not has_row(node)
        if over_rows:
            node = self._summed_over_rows(i, node)
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

    def _summed_over_rows(self, i: int, node: Node) -> fx.Node:
        """What a result without rows is the sum over the rows of."""
        size = math.prod(node.meta["val"].shape)
        while node.target in (aten.view.default, aten.squeeze.dim, aten.squeeze.dims):
            node = node.args[0]
        if not self.adds[i] or not sums_rows(node) or math.prod(inner(node.args[0])) != size:
            raise RefusedError("a result without rows is no plain sum over the rows")
        return node.args[0]

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
            if store.join in ("=", "+="):
                nest.inside.append(f"{place} {store.join} {value};")
                continue
            start, joined = _JOINED[store.join]
            if in_registers:
                name = f"s{self.count}"
                self.count += 1
                sums.append((store.join, name))
                starts.append(f"float {name} = {start};")
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
        if all(join == "sum" for join, _ in sums):  # the order of a maximum matters where there are NaNs
            yield "#pragma omp simd" + clauses
        yield f"{indent}  for (int64_t i{innermost} = 0; i{innermost} < {shape[-1]}; ++i{innermost}) {{"
        yield from (f"{indent}    {line}" for line in nest.inside)
        yield f"{indent}  }}"
        yield from (f"{indent}  {line}" for line in after)
        yield "  " + "} " * max(1, len(shape) - 1)


_JOINED = {"sum": ("0.0f", "{0} + {1}"), "max": ("-INFINITY", "maximum({0}, {1})")}


def _check_rows(graph: fx.Graph) -> None:
    """Raise unless every size that has to do with the number of rows is that number."""
    values = [node.meta.get("val") for node in graph.nodes]
    tensors = [part for value in values for part in (value if isinstance(value, tuple | list) else [value])]
    sizes: list[Any] = [size for value in tensors if isinstance(value, Tensor) for size in value.shape]
    if len({size.node.expr for size in sizes if isinstance(size, torch.SymInt)}) > 1:
        raise RefusedError("it arranges the rows anew")


def literal(number: Any) -> str:
    """A Python number in C++."""
    if isinstance(number, bool):
        return "true" if number else "false"
    if not isinstance(number, int | float):
        raise RefusedError(f"an operation has {type(number).__name__} for a number")
    value = float(number)
    if math.isnan(value):
        return "NAN"
    if abs(value) > torch.finfo(torch.float32).max:
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{value!r}f"


def c_type(node: Node) -> str:
    """The type of a node's numbers in C++."""
    dtype = node.meta["val"].dtype
    if dtype not in (torch.float32, torch.bool):
        raise RefusedError(f"it computes in {str(dtype).removeprefix('torch.')}, and not in float32")
    return "float" if dtype == torch.float32 else "bool"


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape of a node's value, in which the number of rows is a symbol."""
    return tuple(node.meta["val"].shape)


def has_row(node: Node) -> bool:
    """Whether a node's value has rows."""
    return bool(row_dimensions(node.meta["val"]))


def inner(node: Node) -> tuple[int, ...]:
    """A value's shape in one row."""
    return tuple(size for size in shape_of(node) if not isinstance(size, torch.SymInt))


def with_row(node: Node, at: At) -> At:
    """An element's place in the whole value, from its place in one row."""
    rest = iter(at)
    return tuple(ROW if isinstance(size, torch.SymInt) else next(rest) for size in shape_of(node))


def contiguous(shape: Sequence[int], at: At) -> Index:
    """Where an element of a contiguous array stands."""
    place = ZERO
    for size, index in zip(shape, at, strict=True):
        place = place.scaled(size).added(index if size > 1 else ZERO)
    return place


def linear(node: Node, at: At) -> Index:
    """Where an element stands in the memory of its row."""
    pairs = list(zip(shape_of(node), at, strict=True))
    if any(isinstance(size, torch.SymInt) and index != ROW for size, index in pairs):
        raise RefusedError("a row reads another one")
    rest = [(size, index) for size, index in pairs if not isinstance(size, torch.SymInt)]
    return contiguous([size for size, _ in rest], tuple(index for _, index in rest))


def sums_rows(node: Node) -> bool:
    """Whether a node is a sum over the rows, and over nothing else."""
    if node.target is not aten.sum.dim_IntList:
        return False
    source: Node = node.args[0]
    dims = [d % len(shape_of(source)) for d in node.args[1]]
    return dims == row_dimensions(source.meta["val"])


def _is_made_of_parts(node: Node) -> bool:
    """Whether no single expression says what an element is."""
    return node.target in _PARTS and not (node.target is aten.bmm.default and shape_of(node.args[0])[2] == 1)


def _is_in_memory(node: Node) -> bool:
    """Whether reading a node's elements computes nothing."""
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]
    return node.op == "placeholder"


# ---- What an element of an operation's result is, by elements of its arguments.

Rule = Callable[[_Nest, fx.Node, At], str]


def rule_of(node: Node) -> Rule:
    """What an element of a node is.

    Raises: RefusedError for an operation without a rule, or of another dtype.
    """
    found = _RULES.get(node.target) if node.op == "call_function" else None
    if found is None:
        raise RefusedError(f"it has the operation {node.target}")
    c_type(node)
    return found


def operand(nest: _Nest, node: Node, argument: Any, at: At) -> str:
    """The element of an argument that meets the node's element: its shape is spread to the node's."""
    if not isinstance(argument, fx.Node):
        return literal(argument)
    if not isinstance(argument.meta.get("val"), Tensor):
        raise RefusedError("it computes with the number of rows")
    count = len(shape_of(argument))
    return nest.element(argument, at[len(at) - count :] if count else ())


def pointwise(template: str) -> Rule:
    """An operation on each number by itself, by its C++ with the numbers of its arguments in their places."""

    def rule(nest: _Nest, node: Node, at: At) -> str:
        if node.kwargs.get("rounding_mode"):
            raise RefusedError(f"it has the operation {node.target} with rounding")
        values = [operand(nest, node, argument, at) for argument in node.args]
        alpha = node.kwargs.get("alpha", 1)
        return template.format(*values, alpha=literal(alpha))

    return rule


def scaled_sum(sign: str) -> Rule:
    """A sum or a difference, whose second term may have a factor."""

    def rule(nest: _Nest, node: Node, at: At) -> str:
        left, right = (operand(nest, node, argument, at) for argument in node.args[:2])
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        return f"{left} {sign} {right}" if alpha == 1 else f"{left} {sign} {literal(alpha)} * {right}"

    return rule


def power(nest: _Nest, node: Node, at: At) -> str:
    """x^y."""
    base, exponent = operand(nest, node, node.args[0], at), node.args[1]
    if exponent == 2:
        return f"{base} * {base}"
    return f"std::pow({base}, {operand(nest, node, exponent, at)})"


def clamped(nest: _Nest, node: Node, at: At) -> str:
    """A number within bounds."""
    value, low, high = [operand(nest, node, a, at) if a is not None else None for a in (*node.args, None, None)][:3]
    value = value if low is None else f"({value} < {low} ? {low} : {value})"
    return str(value) if high is None else f"({value} > {high} ? {high} : {value})"


def constant(value: Callable[[fx.Node], Any]) -> Rule:
    """The same number everywhere."""
    return lambda nest, node, at: literal(value(node))


def same(nest: _Nest, node: Node, at: At) -> str:
    """The argument's own element."""
    return nest.element(node.args[0], at)


def cast(nest: _Nest, node: Node, at: At) -> str:
    """The element in another type."""
    return f"({c_type(node)})({nest.element(node.args[0], at)})"


def expanded(nest: _Nest, node: Node, at: At) -> str:
    """The element of what is spread over new or wider dimensions."""
    return operand(nest, node, node.args[0], at)


def sliced(nest: _Nest, node: Node, at: At) -> str:
    """An element some places further."""
    source, dim, start, step = _slice_of(node, 0)
    return nest.element(source, (*at[:dim], at[dim].scaled(step).moved(start), *at[dim + 1 :]))


def _slice_of(node: Node, first: int) -> tuple[Node, int, int, int]:
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


def selected(nest: _Nest, node: Node, at: At) -> str:
    """An element at a fixed place of one dimension."""
    source, dim, place = node.args
    size = shape_of(source)
    dim = dim % len(size)
    if isinstance(size[dim], torch.SymInt):
        raise RefusedError("it selects a row")
    return nest.element(source, (*at[:dim], Index((), place % size[dim]), *at[dim:]))


def unsqueezed(nest: _Nest, node: Node, at: At) -> str:
    """The element without a new dimension of size 1."""
    dim = node.args[1] % len(at)
    return nest.element(node.args[0], (*at[:dim], *at[dim + 1 :]))


def squeezed(nest: _Nest, node: Node, at: At) -> str:
    """The element with the dimensions of size 1 that were taken out."""
    source: Node = node.args[0]
    size = shape_of(source)
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    gone = {d % len(size) for d in dims if not isinstance(size[d], torch.SymInt) and size[d] == 1}
    rest = iter(at)
    return nest.element(source, tuple(ZERO if d in gone else next(rest) for d in range(len(size))))


def permuted(nest: _Nest, node: Node, at: At) -> str:
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


def viewed(nest: _Nest, node: Node, at: At) -> str:
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


def _is_rearranged(node: Node) -> bool:
    """Whether a view has other dimensions than its source, but for those of size 1."""
    source = node.args[0]
    return [n for n in inner(node) if n != 1] != [n for n in inner(source) if n != 1]


def part_of_split(nest: _Nest, node: Node, at: At) -> str:
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


def outer_product(nest: _Nest, node: Node, at: At) -> str:
    """A product over an inner dimension of size 1."""
    left, right = node.args
    row, i, j = at
    return f"{nest.element(left, (row, i, ZERO))} * {nest.element(right, (row, ZERO, j))}"


_VIEWS: dict[Any, Rule] = {
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
    aten.div.Tensor: "{0} / {1}",
    aten.div.Scalar: "{0} / {1}",
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
    aten.minimum.default: "-maximum(-{0}, -{1})",
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

_COSTLY = {
    getattr(aten, name).default
    for name in ("tanh", "sigmoid", "exp", "log", "log1p", "expm1", "sin", "cos", "erf", "sqrt", "rsqrt")
} | {aten.div.Tensor, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor}

_RULES: dict[Any, Rule] = {
    **_VIEWS,
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


# ---- What is put into memory, and by which loops.


def whole(piece: _Piece, node: Node, target: str) -> None:
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


def put_together(piece: _Piece, node: Node, target: str) -> None:
    """`cat`: each part by loops of its own shape."""
    parts, dim = node.args[0], _inner_dim(node, node.args[1] if len(node.args) > 1 else 0)
    start = 0
    for part in parts:
        _copy(piece, node, part, target, dim, start, 1, piece.level_after([part]))
        start += inner(part)[dim]


def put_into(piece: _Piece, node: Node, target: str) -> None:
    """`slice_scatter`: the whole first, then what stands in a part of it."""
    base, source = node.args[:2]
    _, over, start, step = _slice_of(node, 1)
    if isinstance(shape_of(node)[over], torch.SymInt):  # all rows: nothing is left of the whole
        shape, level = inner(node), piece.level_after([source])
        c_type(node)
        value: Callable[[_Nest, At], str] = lambda nest, at: nest.element(source, with_row(source, at))  # noqa: E731
        piece.stores.append(
            Store(node, [source], target, shape, (), level, value, lambda at: contiguous(shape, at), "=")
        )
        return
    dim = _inner_dim(node, node.args[2] if len(node.args) > 2 else 0)
    level = piece.level_after([base, source])
    _copy(piece, node, base, target, dim, 0, 1, level)
    _copy(piece, node, source, target, dim, start, step, level + 1)


def _copy(piece: _Piece, node: Node, part: Node, target: str, dim: int, start: int, step: int, level: int) -> None:
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


def reduction(join: str) -> Callable[[_Piece, fx.Node, str], None]:
    """A sum or a maximum over some dimensions of a row."""

    def reduce(piece: _Piece, node: Node, target: str) -> None:
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


def products_of_rows(piece: _Piece, node: Node, target: str) -> None:
    """`bmm`: a small product in each row, with loops in the order in which the right side lies in memory."""
    left, right = node.args
    if row_dimensions(node.meta["val"]) != [0]:
        raise RefusedError("it has a product that is not each row's own")
    rows, columns, count = *inner(node), shape_of(left)[2]
    c_type(node)
    turned = _turned(right)

    def value(nest: _Nest, at: At) -> str:
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
    while node.op == "call_function" and node.target in _VIEWS:
        turns += _VIEWS[node.target] is permuted
        node = node.args[0]
    return turns % 2 == 1


_PARTS: dict[Any, Callable[[_Piece, fx.Node, str], None]] = {
    aten.cat.default: put_together,
    aten.slice_scatter.default: put_into,
    aten.sum.dim_IntList: reduction("sum"),
    aten.amax.default: reduction("max"),
    aten.bmm.default: products_of_rows,
}
