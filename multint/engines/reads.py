"""What a step may read of its cell and beyond: one walk that gives the key of a trace and the tensors it takes.

Tracing freezes everything that a step reads, except the tensors. So all that it can read is followed: attributes of
modules, private ones too, containers, partial functions, plain objects, the code of the cell's classes and of the
functions it names, with their closures, defaults and the globals that they name. Two cells have equal keys where all of
that is equal by value, whoever they are: then one trace serves both. Which tensors are one and the same is part of the
key, so that a weight tied to another one makes another key.

What cannot be followed, such as a lock, a logger or a trainer, is replaced by a tripwire in the copy of the cell that
is traced: a step that uses it is refused by name. What stays unseen is what no walk of Python's objects shows: files,
the clock, the environment, a name that the step puts together as it runs, and the inside of an object of the standard
library, NumPy or torch that a global or a closure holds, such as a `configparser.ConfigParser`.
"""

from __future__ import annotations

import argparse
import copyreg
import enum
import functools
import operator
import sys
import types
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from multint.engines import private
from multint.engines.tripwire import Tripwire
from multint.engines.witness import Witness
from multint.errors import EngineError

# A step that reaches more than this is refused: following it would cost more than the scan, at every call.
_MOST = 5000

_PLAIN = (type(None), bool, int, bytes, type(Ellipsis), type(NotImplemented))
_NUMBERS_AND_TEXT = (int, float, complex, str, bytes, range, slice)
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_CONTAINERS = (tuple, list, dict, set, frozenset, deque)
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
)
_GETTERS = (operator.itemgetter, operator.attrgetter, operator.methodcaller)
_CACHED = type(functools.lru_cache(len))
# What wraps functions, and where they are in it.
_WRAPPERS: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    _CACHED: ("__wrapped__",),
    property: ("fget",),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}

# Libraries whose functions and classes are what their names say: they are told apart by identity and not followed.
_LIBRARIES = sys.stdlib_module_names | {"torch", "multint", "numpy", "einops", "opt_einsum"}


# What every class has, or no step reads; and what says how it is copied.
_OF_EVERY_CLASS = {
    *vars(type("_", (), {"__slots__": ()})), *vars(type("_", (), {})), "__abstractmethods__", "_abc_impl",
    "__annotations__", "__parameters__", "__orig_bases__", "__match_args__", "__dataclass_fields__",
    "__dataclass_params__", "_member_map_", "_member_names_", "_value2member_map_", "__firstlineno__",
    "__static_attributes__", "__annotate__", "__init__", "__new__", "__repr__", "__slotnames__",
}  # fmt: skip
_COPIES = {"__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__copy__"}


class _Same:
    """A key that is equal to itself alone, for as long as what it stands for lives."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Walk:
    """One walk over a cell: `key`, by value, and `tensors`, each once, in the order in which they were met.

    Args:
        state_type: of the state, whose methods the step may call.
        named: whether to note `entries`, the mark of everything that has a name, to tell what has changed.

    Raises: EngineError where the step reaches too much to be followed.
    """

    def __init__(self, cell: nn.Module, state_type: type = tuple, named: bool = False) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []  # of the tensors: where they were met first
        self.slots: list[list[tuple[Any, str, Any]]] = []  # for each tensor: what holds it, how, and under what name
        self.unfollowed: dict[int, tuple[Any, str]] = {}  # by identity: what the copy has a tripwire for, and its name
        self.python_modules: dict[int, types.ModuleType] = {}  # by identity: they are shared with the copy
        self.entries: dict[str, Any] | None = {} if named else None
        self.witness = Witness()
        self._cell = cell
        self._index: dict[int, int] = {}  # of the tensors, by identity
        self._met: dict[int, int] = {}
        self._path: list[str] = []
        self._beyond = 0  # above 0 beneath functions and classes, which the cell shares with its copy
        # First, so that no tensor of a module passes for one that only a closure holds.
        for prefix, module in cell.named_modules():
            for how, name, tensor in private.held(module):
                self._hold(f"{prefix}.{name}".lstrip("."), tensor, (module, how, name))
        try:
            self.key: Hashable = (self._mark(cell), self._class(state_type))
        except RecursionError:
            raise EngineError("fused: the step reaches something too deep to be followed") from None

    def _hold(self, name: str, tensor: Any, slot: tuple[Any, str, Any]) -> None:
        """Take a tensor that can be replaced where it is."""
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
            if id(tensor) not in self._index:
                while name in self.names:  # paths may show alike: in {1: a, "1": b}
                    name += "'"
                self._index[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
                self.names.append(name)
                self.slots.append([])
            self.slots[self._index[id(tensor)]].append(slot)

    def _child(self, name: Any, value: Any, slot: tuple[Any, str, Any] | None = None) -> Hashable:
        self._path.append(str(name))
        if slot is not None and not self._beyond and issubclass(type(value), Tensor):
            self._hold(".".join(self._path), value, slot)
        mark = self._mark(value)
        if self.entries is not None:
            version = private.version(value) if issubclass(type(value), Tensor) else None
            shown = ".".join(self._path)
            while shown in self.entries:
                shown += "'"
            self.entries[shown] = (mark, version)
        self._path.pop()
        return mark

    def _mark(self, value: Any) -> Hashable:
        """What tells a value from another one: equal marks, equal behaviour of the step."""
        kind = type(value)
        if kind is Tripwire:  # in a copy; a look at it would be an error
            return "not followed"
        if kind is str:
            return str(value)
        if kind in _PLAIN:
            return kind, value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, _OF_TORCH):
            return value
        if isinstance(value, enum.Enum):
            return self._class(kind), value.name
        if kind in _NUMBERS_AND_TEXT:  # not by ==, by which 0.0 is -0.0 and NaN is not itself
            return kind, repr(value)
        if isinstance(value, _NUMBERS_AND_TEXT):
            return self._class(kind), _plain_repr(value), *self._own(value)
        if isinstance(value, type):
            return self._class(value)
        met = self._met.get(id(value))
        if met is not None:
            if value is self._cell:  # which a witness that holds it would keep alive
                self.witness.is_complete = False
            return "met", met
        self._met[id(value)] = len(self._met)
        if len(self._met) > _MOST:
            raise EngineError(f"fused: the step reaches too much to be followed, by way of {'.'.join(self._path)}")
        return self._followed(kind, value)

    def _followed(self, kind: type, value: Any) -> Hashable:
        """The mark of what is met for the first time. The order matters: a library's class may also be a container."""
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, _CONTAINERS):
            return self._container(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if kind in _WRAPPERS:
            self.witness.is_complete = False
            return kind, *(self._child(name, getattr(value, name)) for name in _WRAPPERS[kind])
        library = _library(kind)
        if isinstance(value, types.ModuleType) and (_library(value) is not None or self._beyond):
            self.python_modules[id(value)] = value
            return _Same(value)
        if any(part.__module__ == "numpy" for part in kind.__mro__) and hasattr(value, "tobytes"):
            self.witness.is_complete = False
            if not value.dtype.hasobject:
                return self._class(kind), str(value.dtype), value.shape, value.tobytes(), *self._own(value)
        elif isinstance(value, _BUILT_IN):
            owner = getattr(value, "__self__", None)
            bound = owner is not None and not isinstance(owner, types.ModuleType | type)
            self.witness.is_complete &= not bound
            return (value.__name__, self._child("__self__", owner)) if bound else _Same(value)
        elif isinstance(value, _GETTERS):
            return kind, repr(value)
        elif private.is_operation(value) or kind.__name__ == "ufunc":
            return _Same(value)
        elif library in (None, "multint") or kind in (types.SimpleNamespace, argparse.Namespace):
            return self._object(value)
        return self._not_followed(value)

    def _not_followed(self, value: Any) -> Hashable:
        """What has an inside that no walk shows: a tripwire where the copy can have one, else told by identity."""
        self.witness.is_complete = False  # it may hold the cell
        if self._beyond:
            return _Same(value)
        self.unfollowed[id(value)] = value, ".".join(self._path)
        return "not followed", type(value)

    def _tensor(self, tensor: Tensor) -> Hashable:
        index = self._index.get(id(tensor))
        if index is None and (type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided):
            return self._not_followed(tensor)
        own = tuple((name, self._child(name, value)) for name, value in vars(tensor).items())
        marks = tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, own
        if index is not None:
            self.witness.is_complete &= tensor.is_leaf and not private.has_hooks(tensor)  # which may hold the cell
            self.witness.tensor(tensor)
            self.witness.dictionary(vars(tensor))
            return index, *marks
        self.witness.is_complete = False
        # It cannot be replaced, so a trace would freeze its numbers. Capturing refuses it; Python may read it all the
        # same.
        return _Same(tensor), private.version(tensor), *marks

    def _module(self, module: nn.Module) -> Hashable:
        if module is not self._cell:
            self.witness.type_of(module)
        for contents in private.dictionaries(module):
            self.witness.dictionary(contents)
        marks: list[Hashable] = [self._class(type(module)), module.training]
        for _, name, value in private.held(module):
            marks += [name, self._child(name, value)]
        for name, part in private.parts(module):
            marks += [name, self._child(name, part)]
        for name, value in private.attributes(module):
            marks += [name, self._child(name, value, (module, "attribute", name))]
        return (*marks, *(self._child("hook", hook) for hook in private.hooks(module)))

    def _object(self, value: Any) -> Hashable:
        self.witness.type_of(value)
        self.witness.dictionary(getattr(value, "__dict__", {}))
        self.witness.is_complete &= not any(_slots(part) for part in type(value).__mro__)
        marks: list[Hashable] = [self._class(type(value))]
        for name, attribute in _attributes(value):
            marks += [name, self._child(name, attribute, (value, "attribute", name))]
        return tuple(marks)

    def _container(self, value: Any) -> Hashable:
        marks: Hashable
        if isinstance(value, set | frozenset):
            self.witness.is_complete = False
            marks = frozenset(self._mark(entry) for entry in value)
        elif isinstance(value, dict):
            self.witness.dictionary(value)
            # Keys are marked too: 1 and True are one key of a dictionary, and not one value in a step.
            marks = tuple((self._mark(k), self._child(k, v, (value, "entry", k))) for k, v in value.items())
        else:
            self.witness.sequence(value)
            can_change = isinstance(value, list | deque)
            marks = tuple(self._child(i, v, (value, "entry", i) if can_change else None) for i, v in enumerate(value))
        self.witness.is_complete &= not hasattr(value, "default_factory")
        factory = self._child("default_factory", getattr(value, "default_factory", None))
        return self._class(type(value)), marks, factory, *self._own(value)

    def _own(self, value: Any) -> list[Hashable]:
        """What a user's class adds to a container, a number or an array."""
        if _library(type(value)) is not None:
            return []
        return [
            (name, self._child(name, attribute, (value, "attribute", name))) for name, attribute in _attributes(value)
        ]

    def _class(self, kind: type) -> Hashable:
        """A class by identity, with what is in it now: methods can be replaced, and attributes set."""
        met = self._met.get(id(kind))
        if met is not None:
            return "met", met
        self._met[id(kind)] = len(self._met)
        followed, known = _parts(kind.__mro__)
        marks: list[Hashable] = [_Same(kind), *(contents_of(part) for part in known)]
        for part in known:
            self.witness.contents(part, contents_of(part))
        self._beyond += 1
        users = _library(type(kind)) is None
        self.witness.is_complete &= not followed and not users
        if users:
            marks.append(self._class(type(kind)))
        for part in followed:
            for name, value in vars(part).items():
                if name in _COPIES:
                    raise EngineError(f"fused: {part.__name__} has a {name} of its own, so a copy of it may be another")
                if name not in _OF_EVERY_CLASS:
                    marks += [name, self._child(name, value)]
        self._beyond -= 1
        return tuple(marks)

    def _function(self, function: types.FunctionType) -> Hashable:
        # A library's function is what its name says, but one that it has made around the user's holds that.
        known = _library(function) is not None
        if known and not function.__closure__:
            return _Same(function)
        self.witness.is_complete = False
        marks: list[Hashable] = [function.__code__]
        self._beyond += 1
        marks += [self._child("defaults", function.__defaults__), self._child("defaults", function.__kwdefaults__)]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                marks.append(self._child(name, cell.cell_contents))
            except ValueError:  # a variable that is not set yet
                marks.append(None)
        if not known:
            marks += self._globals(function)
        marks += [(name, self._child(name, value)) for name, value in function.__dict__.items()]
        self._beyond -= 1
        return tuple(marks)

    def _globals(self, function: types.FunctionType) -> Iterator[Hashable]:
        """The globals that a function's code names, and of the user's modules what the code names of them."""
        names = _named(function.__code__)
        imported = [sys.modules[name] for name in names if name in sys.modules]  # in the function itself
        modules: dict[int, types.ModuleType] = {}
        self._users_modules([*imported, *(function.__globals__.get(name) for name in names)], names, modules)
        for space in (function.__globals__, *map(vars, modules.values())):
            for name in names:
                if name in space and not isinstance(space[name], types.ModuleType):
                    yield name
                    yield self._child(name, space[name])

    def _users_modules(self, values: Iterable[Any], names: tuple[str, ...], found: dict[int, types.ModuleType]) -> None:
        """The user's modules among the values, and those that their names lead to."""
        for value in values:
            if isinstance(value, types.ModuleType) and _library(value) is None and id(value) not in found:
                found[id(value)] = value
                self._users_modules([vars(value).get(name) for name in names], names, found)


@functools.lru_cache(maxsize=4096)
def _named(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in a function's code, and in that of the functions within it."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _named(constant)]
    # Words in strings too, as in getattr(module, "scale").
    words = [constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()]
    return tuple(dict.fromkeys([*code.co_names, *words, *inner]))


@functools.lru_cache(maxsize=4096)
def _parts(order: tuple[type, ...]) -> tuple[list[type], list[type]]:
    """Of the classes in a method resolution order, the user's, which are followed, and the libraries' that matter."""
    own = [part for part in order if _library(part) is None]
    known = [part for part in order if _library(part) == "multint" or issubclass(part, nn.Module)]
    return own, [part for part in known if part is not nn.Module and part not in own]


_kept_contents: WeakKeyDictionary[type, tuple[list[int], list[Any], int]] = WeakKeyDictionary()


def contents_of(kind: type) -> Hashable:
    """A number that changes when something in a library's class is replaced.

    What was there is kept, so that no identity comes twice.
    """
    kept = _kept_contents.get(kind)
    if kept is None:
        copyreg._slotnames(kind)  # type: ignore[attr-defined]  # leaves its result there, as the first copy would
    ids = list(map(id, vars(kind).values()))
    if kept is None or kept[0] != ids:
        before = kept[1] if kept else []
        kept = ids, before + list(vars(kind).values()), len(before)
        _kept_contents[kind] = kept
    return kept[2]


def _plain_repr(value: Any) -> str:
    """How a number or a text shows, whatever a class of the user's makes of it."""
    base = next(part for part in type(value).__mro__ if part in _NUMBERS_AND_TEXT)
    return base.__repr__(value)


def _library(thing: Any) -> str | None:
    """The library that a function, a class or a module is from, if it is one of those that are not followed."""
    if isinstance(thing, types.ModuleType):
        name: Any = thing.__name__
    elif isinstance(thing, types.FunctionType):  # not by __module__, which functools.wraps copies
        name = thing.__globals__.get("__name__")
    else:
        name = thing.__module__
    top = name.partition(".")[0] if isinstance(name, str) else ""
    made_of_python = isinstance(thing, types.FunctionType) or (isinstance(thing, type) and thing.__flags__ & _ON_HEAP)
    if top == "builtins" and made_of_python:  # what code is called that ran without a name, by exec
        return None
    return top if top in _LIBRARIES else None


_ON_HEAP = 1 << 9  # a flag of classes that Python code has made


def _attributes(value: Any) -> Iterable[tuple[str, Any]]:
    """An object's attributes, in its dictionary or its slots."""
    slots = [_mangled(part, name) for part in type(value).__mro__ for name in _slots(part)]
    yield from ((name, getattr(value, name)) for name in slots if hasattr(value, name))
    yield from getattr(value, "__dict__", {}).items()


def _mangled(kind: type, name: str) -> str:
    """A private name as Python keeps it."""
    private_name = name.startswith("__") and not name.endswith("__")
    return f"_{kind.__name__.lstrip('_')}{name}" if private_name else name


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]
