"""What is wrong in a config, in one message: the path, the value, the choices and the nearest match.

jsonargparse says where it failed only in the prose of nested messages, so this reads that prose. What it does not
recognise is shown as jsonargparse put it.
"""

import inspect
import re
import sys
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NamedTuple

from lightning import LightningDataModule, LightningModule, Trainer

from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.core.trust import TRUSTED

ROOTS = {"trainer": Trainer, "model": LightningModule, "data": LightningDataModule}
TOP_LEVEL = ("config", "seed_everything", "trainer", "model", "data", "name", "threads", "ckpt_path", "base")

# Where it failed: the keys, and the class whose settings were being read, of a factory or of a plain value.
_KEY = re.compile(r'Parser key "([^"]+)"')
_FACTORY = re.compile(r"Callable\[\[(.*?)\], [\w.]+\] expects")
_FACTORY_CLASS = re.compile(r"class_path='([\w.]+)'")
_VALUE_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")

# What failed.
_DENIED = re.compile(r"Importing '([^']+)' is not allowed, denied by the '([^']+)'")
_NOT_FOUND = re.compile(r"(No module named '[^']+'|(?:module|type object) '[^']+' has no attribute '[^']+')")
_UNKNOWN_KEY = re.compile(r"(?:[Oo]ption '([^']+)'|unrecognized arguments: --([^\s=]+))")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (.*?)(?:\. Got value|$)", re.MULTILINE)
_OTHER_KIND = re.compile(r"Expected '([^']+)' to be (?:a subclass of|a class|a function)")
_NO_FILE = re.compile(r"File does not exist: '([^']+)'")
_MISSING = re.compile(r"arguments are required: ([\w.]*\w)")
_BAD_VALUE = re.compile(r"^ *(?:- )?Expected an? (.+?)\. Got value: (.*?)(?:\. Got value|$)", re.MULTILINE)
_NONE_FITS = re.compile(r"^ *Given value: (.*?)(?:\. Got value|$)", re.MULTILINE)


class _Place(NamedTuple):
    """Where jsonargparse stopped."""

    keys: tuple[str, ...]  # from the root
    owner: type | None  # the class whose settings it was reading
    filled: int  # how many of the owner's first arguments its caller gives

    @property
    def path(self) -> str:
        return ".".join(self.keys) or "the config"


def explain(error: ArgumentError) -> str:
    """One message for a failure to parse a config or a command line."""
    text = str(error.message)
    readings: list[tuple[re.Pattern[str], Callable[..., str]]] = [
        (_DENIED, _denied),
        (_NOT_FOUND, _not_found),
        (_UNKNOWN_KEY, _unknown_key),
        (_UNKNOWN_CLASS, _unknown_class),
        (_OTHER_KIND, _unknown_class),
        (_NO_FILE, _no_file),
        (_MISSING, _missing),
        (_BAD_VALUE, _bad_value),
        (_NONE_FITS, _none_fits),
    ]
    for pattern, reading in readings:
        if match := pattern.search(text):
            return reading(_place(text, match), match)
    return text


def check_classes(
    values: Mapping[str, Any],  # parsed settings by name
    owner: type | None = None,  # the class whose settings they are
    keys: tuple[str, ...] = (),
) -> None:
    """Raises ExperimentError for a class that is abstract, or does not take the arguments that its place gives.

    jsonargparse checks only that it is a subclass of what is expected.
    """
    for key, value in values.items():
        cls = _imported(getattr(value, "class_path", ""))
        if not isinstance(cls, type):
            continue
        place = _Place((*keys, key), owner, 0)
        expected = _types_at(place)
        given = max(expected.values(), default=0)
        if not _fits(cls, given):
            why = "it is abstract" if inspect.isabstract(cls) else f"its constructor does not take {given} arguments"
            hint = choices_message("", _names(expected))
            raise ExperimentError(f"{place.path}: '{cls.__name__}' does not fit: {why}{hint}")
        check_classes(vars(value.get("init_args", {})), cls, place.keys)


def choices_message(given: str, choices: Iterable[str]) -> str:
    """The nearest of the choices, and all of them."""
    choices = list(choices)
    nearest = get_close_matches(given, choices, n=1, cutoff=0.5)
    hint = f". Did you mean '{nearest[0]}'?" if nearest else "."
    return f"{hint} Choices: {', '.join(choices)}" if choices else ""


def _denied(place: _Place, match: re.Match[str]) -> str:
    path, entry = match.groups()
    root = path.partition(".")[0]
    if root in TRUSTED and entry != "*":
        return f"{place.path}: '{path}' is refused: it runs code or loads files that a config names"
    refused = f"{place.path}: '{path}' is in no trusted module ({', '.join(TRUSTED)}), so it is refused"
    # Who writes `torch.os.system` already names a trusted module, and has no module of their own to trust.
    as_written = path in _DENIED.sub("", match.string)
    return f"{refused}. If you trust it, add --trust {root}" if as_written else refused


def _not_found(place: _Place, match: re.Match[str]) -> str:
    return f"{place.path}: {match[1]}"


def _unknown_key(place: _Place, match: re.Match[str]) -> str:
    given = (match[1] or match[2]).split(".")
    if not place.keys and given[0] in ROOTS and len(given) > 1:
        place, given = _Place((given[0],), ROOTS[given[0]], 0), given[1:]
    of = f" of {place.owner.__name__}" if place.owner else ""
    choices = _settings(place) if place.keys else TOP_LEVEL
    path = ".".join((*place.keys, given[0]))
    return f"{path}: there is no setting '{given[0]}'{of}{choices_message(given[0], choices)}"


def _unknown_class(place: _Place, match: re.Match[str]) -> str:
    expected = _types_at(place)
    if {int, float, bool, str} & set(expected):
        names = " or ".join(kind.__name__ for kind in expected)
        return f"{place.path}: '{match[1]}' does not fit: expected {names}"
    names = _names(expected)
    own = ". A class of your own is named with its module, MODULE.Class, and --trust MODULE"
    return f"{place.path}: '{match[1]}' is no class to choose here{choices_message(match[1], names)}{own}"


def _no_file(place: _Place, match: re.Match[str]) -> str:
    return f"{place.path}: '{match[1]}' does not exist{choices_message(match[1], map(str, CONFIGS.glob('*/*.yaml')))}"


def _missing(place: _Place, match: re.Match[str]) -> str:
    owner = f", which {place.owner.__name__} requires" if place.owner else ""
    return f"{place.path}: the setting '{match[1]}' is missing{owner}"


def _bad_value(place: _Place, match: re.Match[str]) -> str:
    expected, value = match.groups()
    if expected.startswith("typing.Literal["):
        choices = re.findall(r"'([^']+)'", expected)
        return f"{place.path}: '{value}' does not fit{choices_message(value, choices)}"
    expected = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", expected)
    return f"{place.path}: '{value}' does not fit: expected {expected}"


def _none_fits(place: _Place, match: re.Match[str]) -> str:
    names = " or ".join(kind.__name__ for kind in _types_at(place))
    return f"{place.path}: '{match[1]}' does not fit" + (f": expected {names}" if names else "")


def _place(text: str, match: re.Match[str]) -> _Place:
    before, after = text[: match.start()], text[match.start() :]
    keys = tuple(".".join(_KEY.findall(before)).split(".")) if _KEY.search(before) else ()
    factories, values = list(_FACTORY.finditer(before)), list(_VALUE_CLASS.finditer(before))
    shown = [path for path in _FACTORY_CLASS.findall(after) if path != match[1]]
    if factories and shown and (not values or factories[-1].start() > values[-1].start()):
        # A factory's class stands in the value shown after the complaint; its caller gives the first arguments.
        return _Place(keys, _imported(shown[0]), len(factories[-1][1].split(",")))
    if values:
        return _Place(keys, _imported(values[-1][1]), 0)
    return _Place(keys, ROOTS.get(keys[0]) if keys else None, 0)


def _imported(path: str) -> type | None:
    """The class, if its module is imported already: explaining a refusal must not import what was refused."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _settings(place: _Place) -> list[str]:
    if place.owner is None:
        return []
    parameters = inspect.signature(place.owner).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named[place.filled :]


def _types_at(place: _Place) -> dict[type, int]:
    """The types that the value at the place may have, or may build, with how many arguments it is given for that."""
    if len(place.keys) == 1:
        return {ROOTS[place.keys[0]]: 0} if place.keys[0] in ROOTS else {}
    hints: dict[str, Any] = {}
    with suppress(NameError):  # a name that only type checkers import
        hints = typing.get_type_hints(place.owner.__init__) if place.owner else {}
    return dict(_leaves(hints.get(place.keys[-1]))) if place.keys else {}


def _leaves(hint: Any, given: int = 0) -> Iterator[tuple[type, int]]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Callable:
        given = len(arguments[0]) if isinstance(arguments[0], list) else 0
        arguments = arguments[-1:]
    if not arguments and isinstance(hint, type) and hint is not type(None):
        yield hint, given
    for argument in arguments:
        yield from _leaves(argument, given)


def _names(expected: dict[type, int]) -> list[str]:
    return sorted({cls.__name__ for base, given in expected.items() for cls in _candidates(base, given)})


def _candidates(base: type, given: int) -> list[type]:
    """The public classes that fit, from trusted modules: those below `base`, and `base` itself.

    torch's and Lightning's own bases are left out where they have subclasses: they are abstract without saying so.
    """
    below = list(_below(base))
    is_foreign = base.__module__.partition(".")[0] in ("torch", "lightning")
    offered = below if below and is_foreign else [base, *below]
    public = [cls for cls in offered if not cls.__name__.startswith("_") and _fits(cls, given)]
    return [cls for cls in public if cls.__module__.partition(".")[0] in TRUSTED]


def _fits(cls: type, given: int) -> bool:
    """Whether it can be built, from that many positional arguments and any others by name."""
    if inspect.isabstract(cls):
        return False
    try:
        inspect.signature(cls).bind_partial(*range(given))
    except (TypeError, ValueError):
        return False
    return True


def _below(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _below(cls)
