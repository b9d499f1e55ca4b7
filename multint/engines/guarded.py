"""A step as torch's own tracer compiles it, for a backend that runs nothing.

`torch.compile` reads a step, and guards all that it has read: attributes, closures, globals, containers, modes. It is
given a backend that runs nothing: what stands for the graph keeps the tensors that it is called with, and gives the
graph's nodes for results. So a call of the compiled step says which graph holds now, with which tensors of the cell,
and which of its results make the new state. The step itself is never run, so nothing of the user's changes.

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
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from multint.engines import private
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


class Graph:
    """Stands for a traced step: called in its place, it keeps the tensors that it is called with.

    Attributes:
        results: its nodes that are the results.
        of_numpy: its arguments that were an array or a number of NumPy's, and are a tensor of its own at each call.
        program: what is made of it; None before that, and when it was dropped.
        failure: why nothing is made of it.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.results: tuple[fx.Node, ...] = tuple(module.graph.output_node().args[0])  # type: ignore[arg-type]
        self.of_numpy = frozenset(filter(private.is_of_numpy, module.graph.nodes))
        self.program: Any = None
        self.failure = ""

    def __call__(self, *arguments: Any) -> tuple[fx.Node, ...]:
        _thread.call = self, arguments
        return self.results

    def forget(self) -> None:
        """Drop what is made of it."""
        self.program = None


class Match(NamedTuple):
    """A call of a step that was not run: the graph that holds, what that takes, and the new state.

    Attributes:
        new: the state's fields, which are the graph's nodes, or arguments as they came.
        x, state: the stand-ins that the step was called with.
    """

    graph: Graph
    arguments: tuple[Any, ...]
    new: Any
    x: Any
    state: Any

    def text(self) -> str:
        """What is computed of what is given, where the number of rows is 1."""
        given = [*(self.x.values() if isinstance(self.x, dict) else [self.x]), *self.state]
        order = {id(tensor): f"given {i}" for i, tensor in enumerate(given)}
        arguments = iter(self.arguments)
        names: dict[fx.Node, Any] = {}
        lines = []
        for node in self.graph.module.graph.nodes:
            value = node.meta.get("example_value")
            argument = next(arguments) if node.op == "placeholder" else None
            if node in self.graph.of_numpy:
                names[node] = node.name
            elif isinstance(argument, Tensor):
                names[node] = order.get(id(argument), id(argument))
            elif value is None and not node.users:  # a question that torch has asked of sizes
                continue
            elif isinstance(value, int | torch.SymInt | torch.SymBool | torch.Size):
                names[node] = private.for_rows(value, 1)
            else:
                shape = private.for_rows(value.shape, 1) if isinstance(value, Tensor) else ""
                lines.append(f"{node.target} {fx.node.map_arg((node.args, node.kwargs), names.get)} {shape}")
                names[node] = f"%{len(lines)}"
        new = [names[value] if isinstance(value, fx.Node) else order.get(id(value), id(value)) for value in self.new]
        return "\n".join([*lines, str(new)])


# The graph that a call in this thread has come to, and what that was given.
_thread = threading.local()


class NewError(Exception):
    """No graph is kept for this call."""


def _call(cell: Any, x: Any, state: Any) -> Any:
    if not torch.compiler.is_compiling():
        raise NewError
    return cell.step(x, state)


_names = map("step{}".format, itertools.count())


class Structure(NamedTuple):
    """What cells have in common that share a guarded step."""

    classes: tuple[type, ...]  # of their modules, and of the state
    names: tuple[tuple[str, ...], ...]  # in the modules' own dictionaries, which hide those of the classes unguarded
    ties: tuple[int, ...]  # where some parameters are one, the place of each's first name: no guard sees that

    @staticmethod
    def of(cell: nn.Module, state: Any) -> Structure:
        """The structure of a cell for states of such a type."""
        modules = private.modules_of(cell)
        parameters = [id(p) for module in modules for p in module._parameters.values() if p is not None]
        are_tied = len(set(parameters)) < len(parameters)
        return Structure(
            (*map(type, modules), type(state)),
            tuple([tuple(vars(module)) for module in modules]),
            tuple(map(parameters.index, parameters)) if are_tied else (),
        )


class GuardedStep:
    """The compiled step of all cells of one structure.

    Attributes:
        graphs: how many there are.
    """

    def __init__(self, structure: Structure) -> None:
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
        self._structure = structure
        self.forget()

    def forget(self) -> None:
        """Begin anew: drop all graphs, and the tracer's own record of them, which nothing else drops."""
        private.forget_code(self._function)
        self.graphs = 0
        self._last: Graph | None = None
        self._imported: list[types.ModuleType] = []
        self._classes: dict[type, None] = {}
        self._watch(self._structure.classes)

    def match(self, cell: nn.Module, x: Any, state: Any, trace: bool) -> Match:
        """Find the graph that holds for a call, by its guards; or trace the step where there is none.

        Raises: NewError where there is none and `trace` is False; else whatever the tracer raises.
        """
        _thread.call = None
        new = (self._traced if trace else self._known)(cell, x, state)
        call, _thread.call = _thread.call, None
        if call is None:
            raise EngineError("fused: the step computes nothing")
        graph, arguments = call
        return Match(graph, arguments, new, x, state)

    def is_changed(self) -> bool:
        """Whether a class that it has to do with holds something else by now, or a module that it imports is another.

        The tracer's guards do not look at that: a method can be replaced on its class.
        """
        classes, namespaces, held = self._watched
        now = _held_by(classes, namespaces)
        return (
            len(now) != len(held)
            or not all(map(operator.is_, now, held))
            or any(sys.modules.get(module.__name__) is not module for module in self._imported)
        )

    def _watch(self, classes: Iterable[type]) -> None:
        self._classes.update(dict.fromkeys(classes))
        kinds = list(self._classes)
        parts = dict.fromkeys(part for kind in kinds for part in kind.__mro__ if part not in _UNCHANGED)
        namespaces = list(map(vars, parts))
        self._watched = kinds, namespaces, _held_by(kinds, namespaces)

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
                self._last.failure = f"fused: the step reads {unseen}"
            elif not issubclass(kind, nn.Module | Tensor) and _library_of(kind) not in _FIXED:
                kinds[kind] = None
        self._watch(kinds)
        scope = self._function.__globals__
        self._imported = [scope[alias] for alias in scope if alias.startswith("__import_")]  # as the tracer calls them
        return [True] * len(guards)


_ORDER, _VALUES = operator.attrgetter("__mro__"), operator.methodcaller("values")
_UNCHANGED = {nn.Module, ABC, *tuple.__mro__}


def _held_by(classes: list[type], namespaces: list[types.MappingProxyType[str, Any]]) -> list[Any]:
    """What classes inherit from, and what these hold."""
    return [*map(_ORDER, classes), *itertools.chain.from_iterable(map(_VALUES, namespaces))]


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
