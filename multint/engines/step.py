"""A cell's step as a graph, and the calls for which it holds: torch's own tracer finds both.

`torch.compile` reads a step, and guards all that it has read: attributes, closures, globals, containers, modes. It is
given a backend that runs nothing: what stands for the graph keeps the tensors that it is called with, and gives marks
for results. So a call of the compiled step says which graph holds now, with which tensors of the cell, and which of
its results make the new state. The step itself is never run, so nothing of the user's changes.

The step is called on stand-ins for its streams and its state: tensors of the same kind without numbers, whose number of
rows is open.
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
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from multint.engines import private, tables
from multint.engines.failures import InternalError, StepError
from multint.engines.tables import MOST, TRACING, Record
from multint.errors import EngineError

# Rows of a stand-in: a prime, which a step that divides the rows does not divide.
_ROWS = 7
# A trace takes as long as some hundred calls. So many in a row are made at once, of a step that changes and of one that
# is refused; then the calls between two of them, which `auto` leaves to the loop, double up to 2 to that power.
_FREE_MISSES, _FREE_REFUSALS, _MOST_WAITS = 8, 2, 10


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

    def stand_in(self, rows: int = _ROWS) -> Tensor:
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
        self._held: list[Any] = []
        results: Any = module.graph.output_node().args[0]
        self.results: list[fx.Node] = list(results)
        self._marks = tuple(map(Mark, range(len(self.results))))

    def watch(self, kinds: Iterable[type]) -> None:
        """Keep what some classes hold now, to see when it changes."""
        self.classes = _namespaces(tuple(kind.__mro__ for kind in kinds))
        self._held = _all_in(self.classes)

    def is_changed(self) -> bool:
        """Whether a watched class holds something else by now."""
        return bool(self.classes) and list(map(id, _all_in(self.classes))) != list(map(id, self._held))

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
                names[node] = private.of_one_row(value)
            else:
                lines.append(f"{node.target} {fx.node.map_arg((node.args, node.kwargs), names.get)}")
                names[node] = f"%{len(lines)}"
        results = self.graph.results
        new = [names[results[v.place]] if isinstance(v, Mark) else order.get(id(v), id(v)) for v in self.new]
        return "\n".join([*lines, str(new)])


class _Thread(threading.local):
    met: tuple[Graph, tuple[Any, ...]] | None = None


_thread = _Thread()


class _NewError(Exception):
    """No graph is kept for this call."""


def _call(cell: Any, x: Any, state: Any) -> Any:
    if not torch.compiler.is_compiling():
        raise _NewError
    return cell.step(x, state)


_names = map("step{}".format, itertools.count())


class _Structure:
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
        return [True] * len(guards)

    def is_changed(self) -> bool:
        """Whether a module that the step imports is another one by now."""
        names = [name for name in self._function.__globals__ if name.startswith("__import_")]
        imported = [self._function.__globals__[name] for name in names]
        return any(sys.modules.get(module.__name__) is not module for module in imported)

    def forget(self) -> None:
        """Drop the tracer's own record of it, which nothing else drops."""
        private.forget_code(self._function)

    def meet(self, cell: nn.Module, x: Any, state: Any, trace: bool) -> Met:
        """Find the graph that holds for a call, by its guards; or trace the step where there is none.

        Raises: _NewError where there is none and `trace` is False; else whatever the tracer raises.
        """
        _thread.met = None
        new = (self._traced if trace else self._known)(cell, x, state)
        if _thread.met is None:
            raise EngineError("fused: the step computes nothing")
        (graph, arguments), _thread.met = _thread.met, None
        return Met(graph, arguments, new)


@dataclass
class _Calls:
    """What is known of a cell's calls of one kind.

    Attributes:
        stand_ins: for the streams and for the state, by which such a call is met.
        structure: in which they were traced; None as long as they were not.
    """

    stand_ins: tuple[Any, Any] = (None, None)
    structure: _Structure | None = None
    misses: int = 0  # in a row: no graph was kept, or none could be made
    waits: int = 0  # calls that `auto` leaves to the loop before it traces again
    reason: str = ""


def meet(cell: nn.Module, x: Any, state: Any, asked: bool, make: Callable[[Met, nn.Module, Any, Any], Any]) -> Met:
    """A call of a cell's step, traced where no graph is kept for it.

    Args:
        x: the streams at one step, as the step takes them.
        asked: whether the engine was asked for by name: then every change of the cell is traced.
        make: (call, cell, stand-ins for x, stand-ins for the state) → what the call's graph keeps as `made`.

    Raises: EngineError where there is none; StepError where the step itself may have failed; InternalError.
    """
    record, (key, held) = tables.record_of(cell), _unguarded(cell, type(state))
    if record.key != key:
        record.key, record.structure = key, _structure_of(key, held)
    kind = _kind(x), type(state), tuple(map(Kind.of, state)), len(state[0]) == 1, torch.is_grad_enabled(), cell.training
    calls = record.calls.get(kind)
    if calls is None:
        calls = record.calls[kind] = _Calls()
    try:
        if calls.structure is None or calls.structure is not record.structure:
            raise _NewError
        try:
            met = calls.structure.meet(cell, *calls.stand_ins, False)
        except Exception as error:  # as where another thread traces just now
            raise _NewError from error
        if met.graph.is_changed() or record.structure.is_changed():
            _renew(record)
            raise _NewError
        if met.graph.made is None:  # it was dropped
            raise _NewError
        calls.misses = 0
    except _NewError:
        if calls.waits and not asked:
            calls.waits -= 1
            raise EngineError(calls.reason) from None
        met = _new(record, calls, cell, x, state, make)
    tables.graphs.move_to_end(met.graph)
    if isinstance(met.graph.made, str):
        raise EngineError(met.graph.made)
    return met


def _new(record: Record, calls: _Calls, cell: nn.Module, x: Any, state: Any, make: Callable[..., Any]) -> Met:
    """Trace the step. Where it is refused, or each call needs that anew, `auto` does so ever more rarely."""
    again, free = calls.structure is not None, _FREE_MISSES
    reason = "fused: the attributes of the cell's modules change from call to call"
    try:
        with TRACING:
            return _trace_for(record, calls, cell, x, state, make)
    except EngineError as error:
        again, free, reason = True, _FREE_REFUSALS, str(error)
        raise
    finally:
        if again:
            calls.misses, calls.reason = calls.misses + 1, reason
            calls.waits = 2 ** min(calls.misses, _MOST_WAITS) if calls.misses > free else 0


def _kind(x: Any) -> Hashable:
    return tuple((name, Kind.of(leaf)) for name, leaf in x.items()) if isinstance(x, dict) else Kind.of(x)


def _structure_of(key: Hashable, held: list[Any]) -> _Structure:
    found: _Structure = tables.structures.get(key) or _Structure(held)
    tables.structures.keep(key, found)
    return found


def _renew(record: Record) -> None:
    """Begin anew with what a record's cell has in common with others of its key."""
    if tables.structures.get(record.key) is record.structure:
        tables.structures.pop(record.key).forget()
    record.structure = _structure_of(record.key, record.structure.held)


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


def _unguarded(cell: nn.Module, state_type: type) -> tuple[Hashable, list[Any]]:
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


def _trace_for(record: Record, calls: _Calls, cell: nn.Module, x: Any, state: Any, make: Callable[..., Any]) -> Met:
    """Find or trace the graph for calls of a kind, and the stand-ins that such calls are met by.

    The loop's later steps get what the step itself gives: another dtype perhaps, and a gradient. The graph is theirs,
    and must be the first step's as well.

    Raises: as `meet`.
    """

    def trace(state_type: type, kinds: list[Kind], rows: int = _ROWS) -> tuple[Met, Any, str]:
        fields = as_state(state_type, [kind.stand_in(rows) for kind in kinds])
        some = streams if rows == _ROWS else _streams(x, rows)
        met = _traced(record, cell, some, fields)
        return met, fields, met.text([*(some.values() if isinstance(some, dict) else [some]), *fields])

    given, streams = list(map(Kind.of, state)), _streams(x, _ROWS)
    state_type, kinds = type(state), given
    for _ in range(3):
        met, fields, text = trace(state_type, kinds)
        after = _new_kinds(met, fields)
        if after == kinds and type(met.new) is state_type:
            break
        state_type, kinds = type(met.new), after
    else:
        raise EngineError("fused: the types or dtypes of the state change from step to step")
    first = [g._replace(shape=k.shape, dtype=k.dtype, device=k.device) for g, k in zip(given, kinds, strict=True)]
    if (first != kinds or type(state) is not state_type) and trace(type(state), first)[2] != text:
        raise EngineError(
            "fused: the step goes by its state's type, by whether that wants a gradient, or by its strides"
        )
    # Of an open number of rows the tracer takes for granted that it is not 1.
    if len(state[0]) == 1 and trace(state_type, kinds, 1)[2] != text:
        raise EngineError("fused: the step branches on the number of rows")
    if met.graph.made is None:
        try:
            met.graph.keep(make(met, cell, streams, fields))
        except EngineError as error:  # its message alone: the traceback would hold the inputs
            met.graph.keep(str(error))
        except Exception as error:
            raise InternalError(met.graph.keep) from error
    calls.stand_ins, calls.structure = (streams, fields), record.structure
    return met


def _streams(x: Any, rows: int) -> Any:
    """Stand-ins for the streams at one step."""
    if isinstance(x, Tensor):
        return Kind.of(x).stand_in(rows)
    return {name: Kind.of(leaf).stand_in(rows) for name, leaf in x.items()}


def _traced(record: Record, cell: nn.Module, x: Any, state: Any) -> Met:
    """Meet a call, and trace the step for it where no graph is kept."""
    if record.structure.graphs >= MOST or record.structure.is_changed():
        _renew(record)
    for restored in (False, True):
        try:
            with private.tracing_settings(side_effects=restored):
                met: Met = record.structure.meet(cell, x, state, True)
                if met.graph.is_changed():
                    _renew(record)
                    met = record.structure.meet(cell, x, state, True)
                return met
        except EngineError:
            raise
        except _NewError:
            raise EngineError("fused: torch.compile is turned off, by a stance or TORCH_COMPILE_DISABLE") from None
        except Exception as error:
            if isinstance(inner := getattr(error, "inner_exception", None), EngineError):  # of our backend
                raise EngineError(str(inner)) from None
            if not restored and _are_restored(cell, private.changed_objects(error)):
                continue
            if private.is_steps_own(error):
                raise StepError from error
            raise EngineError(f"fused: {private.why_untraced(error)}") from None
    raise AssertionError


def _are_restored(cell: nn.Module, changed: list[str]) -> bool:
    """Whether all that a step was seen to change is what it puts back, as its `_restored_by_step` says."""
    places = tuple(f"L['cell'].{name}[" for name in getattr(cell, "_restored_by_step", ()))
    return bool(changed) and all(source.startswith(places) for source in changed)


def _new_kinds(met: Met, state: Any) -> list[Kind]:
    """The kinds of the new state's fields.

    Raises: EngineError for a new state that is none, or of another shape.
    """
    new = met.new
    if not isinstance(new, tuple | list) or not all(isinstance(value, Mark | Tensor) for value in new):
        raise EngineError(f"fused: the step gives a {type(new).__name__}, and not a tuple of tensors")
    if len(new) != len(state):
        raise EngineError(f"fused: the step gives {len(new)} tensors for a state of {len(state)}")
    found = []
    for name, value, old in zip(field_names(state), new, state, strict=True):
        made = met.graph.results[value.place].meta["example_value"] if isinstance(value, Mark) else value
        if made.ndim != old.ndim or tuple(made.shape[1:]) != tuple(old.shape[1:]):
            before, after = (tuple(some.shape[1:]) for some in (old, made))
            raise EngineError(f"fused: the shape of the state's {name} changes from step to step, {before} to {after}")
        found.append(Kind.of(made)._replace(is_contiguous=True))
    return found


def field_names(state: Any) -> list[str]:
    """The names of a state's fields."""
    return list(getattr(state, "_fields", None) or (f"state{i}" for i in range(len(state))))


def as_state(kind: type, fields: list[Any]) -> Any:
    """A state of that type, a named tuple or a plain one."""
    return kind._make(fields) if hasattr(kind, "_make") else kind(fields)


def unaware(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread of its own, which knows nothing of the caller's modes but autocast and the device.

    Inference mode and the hooks of saved tensors, which checkpointing sets, would show in what it does.
    """
    modes: list[Any] = [
        torch.autocast(kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    if torch.get_default_device().type != "cpu":
        modes.append(torch.device(torch.get_default_device()))

    def call() -> Any:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return function(*arguments)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()
