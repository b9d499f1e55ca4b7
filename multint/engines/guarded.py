"""A step as torch's own tracer compiles it, for a backend that runs nothing.

`torch.compile` reads a step, and guards all that it has read: attributes, closures, globals, containers, modes. It is
given a backend that runs nothing: what stands for the graph keeps the tensors that it is called with, and gives marks
for results. So a call of the compiled step says which graph holds now, with which tensors of the cell, and which of
its results make the new state. The step itself is never run, so nothing of the user's changes.

The guards do not see all: what classes hold is compared beside them, and what may change unseen is refused.
"""

from __future__ import annotations

import itertools
import operator
import sys
import threading
import types
import weakref
from abc import ABC
from collections import ChainMap, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from multint.engines import private, tables
from multint.engines.tables import MOST
from multint.errors import EngineError

# Rows of a stand-in: a prime, which a step that divides the rows does not divide.
ROWS = 7


class Kind(NamedTuple):
    """What a step can see of a tensor (B, ...) but its numbers and the number of its rows."""

    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    is_contiguous: bool
    is_inference: bool

    @staticmethod
    def of(tensor: Tensor) -> Kind:
        """The kind of a tensor."""
        return Kind(
            tuple(tensor.shape[1:]),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            tensor.is_contiguous(),
            tensor.is_inference(),
        )

    def stand_in(self, rows: int = ROWS) -> Tensor:
        """A tensor of this kind, without numbers. Its number of rows is open, but for 1."""
        with torch.inference_mode(self.is_inference), torch.enable_grad():
            made = torch.empty(2 * rows, *self.shape, dtype=self.dtype, device=self.device)
            made = made[:rows].clone() if self.is_contiguous else made[::2]
            made = made.detach().requires_grad_(self.requires_grad)
            made = made.view_as(made) if self.requires_grad else made  # no leaf, as what a step gives is none
        if rows > 1:
            torch._dynamo.maybe_mark_dynamic(made, 0)
        return made


class Mark(NamedTuple):
    """Stands for a result of a graph."""

    place: int


class Graph:
    """Stands for a traced step: called in its place, it keeps the tensors that it is called with.

    Attributes:
        made: what is made of it, or a text that says why nothing is; None as long as nobody has asked.
        classes: what the classes hold of objects that the step reads, where these are no modules.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.made: Any = None
        self.classes: list[types.MappingProxyType[str, Any]] = []
        self._held: list[Any] = []  # so that no identity comes twice
        self._ids: list[int] = []
        results: Any = module.graph.output_node().args[0]
        self.results: list[fx.Node] = list(results)
        self._marks = tuple(map(Mark, range(len(self.results))))

    def watch(self, kinds: Iterable[type]) -> None:
        """Keep what some classes hold now, to see when it changes."""
        self.classes = _namespaces(tuple(kind.__mro__ for kind in kinds))
        self._held = _all_in(self.classes)
        self._ids = list(map(id, self._held))

    def is_changed(self) -> bool:
        """Whether a watched class holds something else by now."""
        return bool(self.classes) and list(map(id, _all_in(self.classes))) != self._ids

    def keep(self, made: Any) -> None:
        """Keep what is made of it among the last."""
        self.made = made
        tables.graphs.keep(self, None)

    def forget(self) -> None:
        """Drop what is made of it."""
        self.made = None

    def __call__(self, *arguments: Any) -> tuple[Mark, ...]:
        _thread.met = self, arguments
        return self._marks


class Met(NamedTuple):
    """A call of a step that was not run: its graph, what that takes, and the new state, of marks and of arguments."""

    graph: Graph
    arguments: tuple[Any, ...]
    new: Any

    def text(self, given: Iterable[Tensor]) -> str:
        """What is computed of tensors, where the number of rows is 1.

        Args:
            given: the stand-ins that the step was called with.
        """
        order = {id(tensor): f"given {i}" for i, tensor in enumerate(given)}
        arguments = iter(self.arguments)
        names: dict[fx.Node, Any] = {}
        lines = []
        for node in self.graph.module.graph.nodes:
            value = node.meta.get("example_value")
            argument = next(arguments) if node.op == "placeholder" else None
            if isinstance(argument, Tensor):
                names[node] = order.get(id(argument), id(argument))
            elif value is None and not node.users:  # a question that torch has asked of sizes
                continue
            elif isinstance(value, int | torch.SymInt | torch.SymBool | torch.Size):
                names[node] = private.for_rows(value, 1)
            else:
                lines.append(f"{node.target} {fx.node.map_arg((node.args, node.kwargs), names.get)}")
                names[node] = f"%{len(lines)}"
        results = self.graph.results
        new = [names[results[v.place]] if isinstance(v, Mark) else order.get(id(v), id(v)) for v in self.new]
        return "\n".join([*lines, str(new)])


class _Thread(threading.local):
    met: tuple[Graph, tuple[Any, ...]] | None = None


_thread = _Thread()


class NewError(Exception):
    """No graph is kept for this call."""


def _call(cell: Any, x: Any, state: Any) -> Any:
    if not torch.compiler.is_compiling():
        raise NewError
    return cell.step(x, state)


_names = map("step{}".format, itertools.count())


class Structure:
    """The compiled step of all cells of one key.

    Args:
        held: what the key names by identity, so that no identity comes twice.
    """

    def __init__(self, held: list[Any]) -> None:
        # With code of its own, by which torch keeps its guards, and globals of its own, to which its tracer adds.
        self._function = types.FunctionType(_call.__code__.replace(co_name=next(_names)), dict(globals()))
        # The tracer keeps for good what it is given here, so that is not to keep this alive.
        backend, look_at = weakref.WeakMethod(self._backend), weakref.WeakMethod(self._look_at)
        self._traced = torch.compile(
            self._function,
            backend=lambda module, _: backend()(module),  # type: ignore[misc]
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": lambda guards: look_at()(guards)},  # type: ignore[misc]
        )
        self._known = torch._dynamo.run(self._function)
        self._last: Graph | None = None
        self._imported: list[types.ModuleType] = []
        self.held = held
        self.graphs = 0

    def _backend(self, module: fx.GraphModule) -> Graph:
        if any(node.op == "placeholder" and str(node.target).startswith("random_value") for node in module.graph.nodes):
            raise EngineError("fused: the step draws random numbers (random); draw them outside, as streams")
        self.graphs += 1
        self._last = Graph(module)
        return self._last

    def _look_at(self, guards: Sequence[Any]) -> list[bool]:
        """Look at what the tracer guards, and keep all of it: it does not see all changes of what it has read."""
        kinds: dict[type, None] = {}
        for value, name in ((guard.value, guard.name) for guard in guards if guard.has_value):
            kind = value if isinstance(value, type) else type(value)
            if unseen := _unseen(value, name):
                assert self._last is not None
                self._last.keep(f"fused: the step reads {unseen}")
            elif not issubclass(kind, nn.Module | Tensor) and _library_of(kind) not in _FIXED:
                kinds[kind] = None
        if self._last is not None:
            self._last.watch(kinds)
        scope = self._function.__globals__
        self._imported = [scope[alias] for alias in scope if alias.startswith("__import_")]  # as the tracer calls them
        return [True] * len(guards)

    def is_changed(self) -> bool:
        """Whether a module that the step imports is another one by now."""
        return any(sys.modules.get(module.__name__) is not module for module in self._imported)

    def forget(self) -> None:
        """Drop the tracer's own record of it, which nothing else drops."""
        private.forget_code(self._function)

    def meet(self, cell: nn.Module, x: Any, state: Any, trace: bool) -> Met:
        """Find the graph that holds for a call, by its guards; or trace the step where there is none.

        Raises: NewError where there is none and `trace` is False; else whatever the tracer raises.
        """
        _thread.met = None
        new = (self._traced if trace else self._known)(cell, x, state)
        if _thread.met is None:
            raise EngineError("fused: the step computes nothing")
        (graph, arguments), _thread.met = _thread.met, None
        return Met(graph, arguments, new)


def _unseen(value: Any, name: str) -> str:
    """What the tracer's guards do not see all changes of, where this is such a thing."""
    if isinstance(value, OrderedDict) and len(value) > 1 and "_hooks" not in name:
        return "an OrderedDict, whose order may change unseen; use a dict"
    if isinstance(value, ChainMap):
        return "a ChainMap, which may change unseen; use a dict"
    if isinstance(value, _CACHED) and _library_of(value.__wrapped__) not in _FIXED:
        return "a function that keeps its results (functools.cache); call it outside"
    return ""


_CACHED = type(lru_cache(lambda: None))
# Whose classes nobody changes, and whose functions keep what depends on their arguments alone.
_FIXED = {"torch", "multint", "einops", "opt_einsum", *sys.stdlib_module_names}


def _library_of(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]


def _all_in(namespaces: list[types.MappingProxyType[str, Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(map(_VALUES, namespaces)))


def unguarded(cell: nn.Module, state_type: type) -> tuple[Hashable, list[Any]]:
    """A key for what a step may read that torch's guards do not look at, and what the key names by identity.

    That is what the classes of a cell's modules hold, since a method can be replaced on its class, and which names the
    modules' own dictionaries hold, since these hide the classes' names.
    """
    modules = list(cell.modules())
    kinds = *map(type, modules), state_type
    orders = tuple(map(_ORDER, kinds))
    held = [*orders, *_all_in(_namespaces(orders))]
    return (kinds, tuple([tuple(vars(module)) for module in modules]), tuple(map(id, held))), held


_ORDER, _VALUES = operator.attrgetter("__mro__"), operator.methodcaller("values")
_UNCHANGED = {nn.Module, ABC, *tuple.__mro__}


@lru_cache(MOST)
def _namespaces(orders: tuple[tuple[type, ...], ...]) -> list[types.MappingProxyType[str, Any]]:
    """What the classes in some orders of resolution hold, now and later."""
    return [vars(part) for part in dict.fromkeys(itertools.chain.from_iterable(orders)) if part not in _UNCHANGED]
