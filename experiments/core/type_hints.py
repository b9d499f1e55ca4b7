"""What a type hint takes: plain values, which jsonargparse judges, and classes that a value names."""

import inspect
import pkgutil
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt

from experiments.core.errors import ExperimentError, choices_message, nearest_message
from experiments.core.trust import TRUSTED, refusal


class Hint:
    """A type hint, taken apart.

    `bases` are the classes of which it takes subclasses, with how many arguments their caller gives: 0 for a value, N
    for a factory. `items` is the hint of the items of a list of them, `plain` its members that only jsonargparse reads;
    with `is_clear` False these may hold classes too.
    """

    def __init__(self, hint: Any) -> None:
        self.whole = hint
        self.bases: dict[type, int] = {}
        self.items: Hint | None = None
        self.plain: list[Any] = []
        self.is_clear = True
        for member in _members(hint):
            origin, arguments = get_origin(member), get_args(member)
            if not _takes_classes(member):
                self.plain.append(member)
            elif origin in (list, Iterable, Sequence):
                self.items = read(arguments[0])
            elif origin is Callable and arguments[0] is not ... and isinstance(arguments[1], type):
                self.bases[arguments[1]] = len(arguments[0])
            elif isinstance(member, type):
                self.bases[member] = 0
            else:
                self.plain.append(member)
                self.is_clear = False
        self.shown = " or ".join(map(_shown, _members(hint)))

    @property
    def takes_classes(self) -> bool:
        return bool(self.bases or self.items or not self.is_clear)

    def accepts(self, value: Any) -> bool:
        """Whether jsonargparse takes the value as it stands, without the classes of `bases` and `items`."""
        return bool(self.plain) and _accepts(tuple(self.plain), value)

    def filled(self, path: str, cls: type, name: str | None = None) -> int:
        """How many arguments the class gets from its caller.

        Raises ExperimentError where the class, called by that name in the config, is of another kind or does not fit.
        """
        filled = next((filled for base, filled in self.bases.items() if issubclass(cls, base)), None)
        if filled is None:
            raise self.misfit(path, name or cls.__name__)
        if not _fits(cls, filled):
            why = "it is abstract" if inspect.isabstract(cls) else f"its constructor does not take {filled} arguments"
            nearest = "" if inspect.isabstract(cls) else cls.__name__
            hint = choices_message(nearest, self.choices())
            raise ExperimentError(f"{path}: '{cls.__name__}' does not fit: {why}{hint}")
        return filled

    def find(self, path: str, name: str) -> type | None:
        """The class that a name or import path means; None where only jsonargparse can tell.

        Raises ExperimentError where it leads nowhere, or must not be imported.
        """
        if not all(map(str.isidentifier, name.split("."))):
            raise self.misfit(path, name)
        if "." not in name:
            found = {cls for base in self.bases for cls in (base, *_below(base)) if cls.__name__ == name}
            if not found:
                raise self.misfit(path, name)
            paths = {f"{cls.__module__}.{name}" for cls in self._offered() if cls.__name__ == name}
            if len(paths) > 1:
                raise ExperimentError(f"{path}: '{name}' may be {' or '.join(sorted(paths))}: give the whole path")
            return found.pop() if len(found) == 1 else None
        if refused := refusal(name):
            raise ExperimentError(f"{path}: {refused}")
        try:
            target = pkgutil.resolve_name(name)
        except Exception as error:  # what importing runs may fail in any way
            raise self.misfit(path, name) from error
        # Who writes `torch.os.system` already names a trusted module, and has no module of their own to trust.
        home = f"{getattr(target, '__module__', '') or ''}.{getattr(target, '__qualname__', '')}"
        if refusal(home):
            raise ExperimentError(f"{path}: '{name}' is '{home}', which is in no trusted module, so it is refused")
        if isinstance(target, type):
            return target
        # A function may stand for a class, if it says that it returns one.
        is_factory = 0 not in self.bases.values()
        if inspect.ismodule(target) or (is_factory and not _accepts((self.whole,), name)):
            raise self.misfit(path, name)
        return None

    def choices(self) -> list[str]:
        """What a value can be, where that is a list of names."""
        if names := {cls.__name__ for hint in (self, self.items) if hint for cls in hint._offered()}:
            return sorted(names)
        words = (str(value) for member in self.plain if get_origin(member) is Literal for value in get_args(member))
        return list(dict.fromkeys(words))

    def misfit(self, path: str, value: Any) -> ExperimentError:
        """The error for a value that the hint does not take."""
        value = " ".join(str(value)[:100].split())
        if any(get_origin(member) in (Callable, type) for member in self.plain) and (refused := refusal(value)):
            return ExperimentError(f"{path}: {refused}")
        if any(get_origin(member) is not Literal for member in self.plain if member is not type(None)):
            nearest = nearest_message(value, self.choices())
            if value.lstrip("+-").lower() in ("nan", "inf", "infinity"):
                nearest = ". YAML writes these numbers .nan and .inf"
            return ExperimentError(f"{path}: '{value}' does not fit: expected {self.shown}{nearest}")
        hint = choices_message(value, self.choices())
        if not self.takes_classes:
            return ExperimentError(f"{path}: '{value}' does not fit{hint}")
        if cls := _known(value):
            kinds = " or ".join(base.__name__ for base in self.bases)
            says = (inspect.getdoc(cls) or "").partition("\n")[0].removesuffix(".")
            return ExperimentError(f"{path}: '{value}' is no {kinds}: {says}{hint}")
        own = "A class of your own is named with its module, MODULE.Class, and --trust MODULE"
        return ExperimentError(f"{path}: '{value}' is no class to choose here{hint}. {own}")

    def _offered(self) -> Iterator[type]:
        """The public classes that fit, from trusted modules.

        torch's and Lightning's own bases are left out where they have subclasses: they are abstract without saying so.
        """
        for base, filled in self.bases.items():
            below = list(_below(base))
            is_foreign = base.__module__.partition(".")[0] in ("torch", "lightning")
            for cls in below if below and is_foreign else [base, *below]:
                is_own = cls.__module__.startswith("experiments.core.")  # parts of the frame, which it puts in itself
                is_public = "._" not in f"{cls.__module__}.{cls.__name__}" and not is_own
                if is_public and cls.__module__.partition(".")[0] in TRUSTED and _fits(cls, filled):
                    yield cls


def _known(name: str) -> type | None:
    """The project's class of that name, if its package exports it: it exists, but is of another kind."""
    for package in ("multint", "models", "experiments"):
        cls = getattr(sys.modules.get(package), name.removeprefix(f"{package}."), None)
        if isinstance(cls, type):
            return cls
    return None


@cache
def read(hint: Any) -> Hint:
    """The hint, taken apart."""
    return Hint(hint)


def _members(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for member in get_args(hint):
            yield from _members(member)
    else:
        yield hint


@cache
def _parser(hint: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _accepts(members: tuple[Any, ...], value: Any) -> bool:
    try:
        _parser(Union[members]).parse_object({"value": value})  # noqa: UP007 (of a tuple)
    except ArgumentError:
        return False
    return True


def _takes_classes(hint: Any) -> bool:
    # Where it does, jsonargparse offers the help of a class.
    return "--value.help" in _parser(Optional[hint])._option_string_actions  # noqa: UP045 (of a value)


_SHOWN = {PositiveInt: "int above 0", PositiveFloat: "float above 0"}


def _shown(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if hint in _SHOWN:
        return _SHOWN[hint]
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return re.sub(r"(\w+\.)+", "", hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint))


def _fits(cls: type, filled: int) -> bool:
    """Whether it can be built, from that many positional arguments and any others by name."""
    if inspect.isabstract(cls):
        return False
    try:
        inspect.signature(cls).bind_partial(*range(filled))
    except (TypeError, ValueError):
        return False
    return True


def _below(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _below(cls)
