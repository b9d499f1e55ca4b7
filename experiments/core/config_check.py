"""What is wrong in a config, in one message: the path, the value, the choices and the nearest match.

Asked after jsonargparse has refused it: the files and options are followed along the constructors' signatures to the
first mistake that is seen so. Nothing is refused here that jsonargparse takes.
"""

import inspect
import os
import pkgutil
import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from types import UnionType
from typing import Any, Literal, NamedTuple, Optional, Union, get_args, get_origin

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt

from experiments.core.configs import NoYAMLError, load_yaml, read_config, read_text
from experiments.core.errors import ExperimentError, choices_message, nearest_message
from experiments.core.trust import TRUSTED, refusal

_SPEC = {"class_path", "init_args", "dict_kwargs"}


class Setting(NamedTuple):
    """What can be given under a name."""

    hint: "Hint"
    default: Any = None
    is_required: bool = False
    group: type | None = None  # the class whose settings these are, without a choice


class Added(NamedTuple):
    """A value that is given to be added to a list, by `NAME+`."""

    value: Any


def explain(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Raises ExperimentError for a mistake in the config files and options of a command, if it finds one.

    Args:
        parser: the command's parser.
        argv: its arguments, after `expanded`.
    """
    given: list[dict[str, Any]] = []
    for name, value in _options(argv):
        if name not in ("-c", "--config"):
            given.append({name.lstrip("-"): value})
        elif value is None or (config := read_config(value)) is None or "config" in config:
            return  # settings that are not seen here
        else:
            given.append(config)
    _check_settings(_settings(parser), "", given)


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options and their values; None for one without."""
    arguments = list(argv)
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        if name.startswith("-") and name.lstrip("-"):
            follows = bool(arguments) and not arguments[0].startswith("--")
            yield name, value if equals else arguments.pop(0) if follows else None


def _settings(parser: ArgumentParser) -> dict[str, Setting]:
    """What a parser takes, by name. A group, such as the trainer's settings, is the class that they are of."""
    settings = {}
    required = getattr(parser, "_extra_required_keys", ())
    for action in parser._actions:
        group = getattr(action, "basetype", None)
        if group or (action.default is not SUPPRESS and "." not in action.dest):  # not --help, nor those of a group
            hint = read(group or getattr(action, "_typehint", Any))  # no hint, as of --config: anything
            is_required = action.required or action.dest in required
            settings[action.dest] = Setting(hint, action.default, is_required, group)
    return settings


@cache
def _settings_of(cls: type, filled: int) -> dict[str, Setting]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={filled} if filled else None, fail_untyped=False)
    return _settings(parser)


def _check_settings(
    settings: dict[str, Setting],
    path: str,
    given: Sequence[Mapping[str, Any]],  # one over the other
    owner: type | None = None,
) -> None:
    values: dict[str, list[Any]] = {}  # each setting's, in turn
    for part in given:
        for key, value in _undotted(part).items():
            name = key.removesuffix("+")
            if name not in settings:
                of = f" of {owner.__name__}" if owner else ""
                place = f"{path}.{name}".lstrip(".")
                raise ExperimentError(f"{place}: there is no setting '{name}'{of}{choices_message(name, settings)}")
            values.setdefault(name, []).append(value if name == key else Added(value))
    for name, of_name in values.items():
        _check(settings[name], f"{path}.{name}".lstrip("."), of_name)
    for name, setting in settings.items():
        if setting.is_required and values.get(name, [None])[-1] is None:
            where = f"{path}: the setting '{name}' is missing, which {owner.__name__} requires" if owner else None
            raise ExperimentError(where or f"the setting '{name}' is missing. Start from a config: --config CONFIG")


def _check(setting: Setting, path: str, values: Sequence[Any]) -> None:
    """Raises ExperimentError for a mistake among the values that are given to a setting, one over the other."""
    hint, parts = setting.hint, list[list[Any]]()  # what is given to a class in turn; to each item, of a list of them
    for given in values:
        value = given.value if isinstance(given, Added) else given
        if value is None and setting.group:
            raise ExperimentError(f"{path}: it is empty, expected settings, NAME: VALUE")
        # jsonargparse takes the path of a file for classes and for lists.
        if isinstance(value, str) and os.path.isfile(value) and (hint.takes_classes or "[" in hint.shown):
            _loaded(path, read_text(value))  # only so that nobody walks a huge one
            return
        if isinstance(value, str) and hint.takes_classes and not hint.accepts(value):
            value = _loaded(path, value)
        if setting.group and not isinstance(value, dict):
            raise ExperimentError(f"{path}: '{value}' does not fit: expected settings, NAME: VALUE")
        if isinstance(given, Added):
            parts += [[item] for item in (value if isinstance(value, list) else [value])]
        elif value is None or hint.accepts(value):
            parts = []
        elif isinstance(value, list) and hint.items:
            if None in value and not hint.items.accepts(None):
                raise hint.items.misfit(path, None)
            before = parts if len(parts) == len(value) else [[]] * len(value)
            parts = [[*old, item] for old, item in zip(before, value, strict=True)]
        elif isinstance(value, dict) and parts and "class_path" not in value:
            parts[-1].append(value)
        elif isinstance(value, dict | str) and hint.takes_classes and hint.is_clear:
            parts = [[*(parts[0] if len(parts) == 1 else []), value]]
        elif hint.is_clear or "{" not in str(value):
            raise hint.misfit(path, value)
    item = setting if hint.bases else Setting(hint.items or hint)
    for part in parts if hint.takes_classes else []:
        _check_class(item, path, part)


def _check_class(setting: Setting, path: str, values: Sequence[Any]) -> None:
    """Raises ExperimentError for a mistake in the name of a class, or in the settings that are given to it in turn."""
    hint, cls, given = setting.hint, setting.group, list[dict[str, Any]]()
    name: str | None = None
    for value in values:
        if not isinstance(value, dict | str) or not hint.bases:
            raise hint.misfit(path, value)
        spec = {"class_path": value} if isinstance(value, str) else _undotted(value)
        own = spec.keys() - _SPEC
        if own and len(own) < len(spec):
            raise ExperimentError(f"{path}: '{min(own)}' stands beside class_path or init_args, expected in init_args")
        if "class_path" in spec:
            before, name = cls, str(spec["class_path"])
            cls = hint.find(path, name)
            given = given if cls is before else []
        elif cls is None:
            cls = _implied(setting, path, spec)
        arguments = spec if own else _loaded(path, spec.get("init_args", {}))
        if cls is None or (isinstance(arguments, str) and os.path.isfile(arguments)):
            return  # which only jsonargparse can tell
        if not isinstance(arguments, dict):
            raise ExperimentError(
                f"{path}: '{arguments}' does not fit: expected init_args to hold settings, NAME: VALUE"
            )
        known = _settings_of(cls, hint.filled(path, cls, name))
        if isinstance(kwargs := spec.get("dict_kwargs"), dict):  # for what is in no signature
            arguments = arguments | {key: of_key for key, of_key in kwargs.items() if key in known}
        given.append(arguments)
    if cls is not None:
        _check_settings(_settings_of(cls, hint.filled(path, cls, name)), path, given, cls)


def _implied(setting: Setting, path: str, given: dict[str, Any]) -> type | None:
    """The class that settings are for where none was named: the default, or else the one that is expected."""
    with suppress(TypeError, KeyError):
        return setting.hint.find(path, setting.default["class_path"])
    if len(setting.hint.bases) != 1:
        return None
    [base] = setting.hint.bases
    names = given.get("init_args") or given
    if base.__name__ not in setting.hint.choices() and isinstance(names, dict) and names:
        choices = choices_message("", setting.hint.choices())
        raise ExperimentError(f"{path}: '{min(names)}' is given, but no class was named that could have it{choices}")
    return base


def _undotted(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with `a.b: 1` as `a: {b: 1}`."""
    nested: dict[str, Any] = {}
    for key, value in given.items():
        name, _, rest = str(key).partition(".")
        before = nested.get(name)
        nested[name] = {**(before if isinstance(before, dict) else {}), rest: value} if rest else value
    return nested


def _loaded(path: str, value: Any) -> Any:
    """A value as jsonargparse reads it: a text may hold a mapping or a list, or mean nothing."""
    if not isinstance(value, str) or not value.strip():
        return value
    with suppress(NoYAMLError):
        loaded = load_yaml(value, path)
        return loaded if loaded is None or isinstance(loaded, dict | list) else value
    return value


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
