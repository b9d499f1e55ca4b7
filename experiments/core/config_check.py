"""What is wrong in a config, in one message: the path, the value, the choices and the nearest match.

The files and options are put together as jsonargparse will, and followed along the constructors' signatures, before
jsonargparse sees them. What only jsonargparse can judge is left to it: what it takes and can be built, passes.
"""

import os
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from experiments.core.configs import NoYAMLError, load_yaml, read_config, read_text
from experiments.core.errors import ExperimentError, choices_message
from experiments.core.type_hints import Hint, read

UNKNOWN = object()  # a value that only jsonargparse can judge
SPEC = {"class_path", "init_args", "dict_kwargs"}
# Of these an empty text, as from an unset shell variable, would mean the current folder.
NEVER_EMPTY = ("name", "ckpt_path", "base", "trainer.default_root_dir")


class Setting(NamedTuple):
    """What can be given under a name."""

    hint: Hint
    default: Any = None
    is_required: bool = False
    group: type | None = None  # the class whose settings these are, without a choice


class Chosen(NamedTuple):
    """A class that was chosen, how many arguments its caller gives, and the settings given to it."""

    cls: type
    filled: int
    given: dict[str, Any]

    @property
    def settings(self) -> dict[str, Setting]:
        return _settings_of(self.cls, self.filled)


def check_config(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Raises ExperimentError for the first mistake in the config files and options of a command.

    Args:
        parser: the command's parser.
        argv: its arguments, after `expanded`.
    """
    settings = _settings(parser)
    # --help, --print_config and others that show something and stop.
    shows = {option for action in parser._actions if action.default is SUPPRESS for option in action.option_strings}
    shows -= {f"--{name}" for name in settings}
    given: dict[str, Any] = {}
    is_whole = True
    for name, value in _options(argv):
        if name == "--print_config":
            is_whole = False  # it shows what is there so far
        elif name in shows or name.endswith(".help"):
            return
        elif name != "--config" or value is None:
            is_whole = is_whole and value is not None  # jsonargparse will miss it
            _loaded(name, value)  # whatever it is for: nobody may walk a huge one
            given = _merged(settings, "", {name.lstrip("-"): value}, given, is_option=True)
        elif (config := read_config(value)) is None or "config" in config:
            return  # settings that are not seen here
        else:
            given = _merged(settings, "", config, given)
    if is_whole:
        _require(settings, "", given)


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options and their values; None for one without."""
    arguments = list(argv)
    while arguments and (argument := arguments.pop(0)) != "--":
        name, equals, value = argument.partition("=")
        if name.startswith("-"):
            follows = bool(arguments) and name != "--print_config" and not _is_option(arguments[0])
            yield name, value if equals else arguments.pop(0) if follows else None


def _is_option(argument: str) -> bool:
    """Whether argparse takes it for one: no negative number, no text with a space, and not the lone dash."""
    is_number = argument[1:].replace(".", "", 1).isdigit()
    return argument.startswith("-") and len(argument) > 1 and not is_number and " " not in argument.partition("=")[0]


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


def _merged(
    settings: dict[str, Setting],
    path: str,
    given: Mapping[str, Any],
    before: dict[str, Any],
    is_option: bool = False,
    owner: type | None = None,
) -> dict[str, Any]:
    """What is given, checked against the settings that there are, over what was given before."""
    merged = dict(before)
    for key, value in _undotted(given).items():
        name = key.removesuffix("+")
        place = f"{path}.{name}".lstrip(".")
        if name not in settings:
            of = f" of {owner.__name__}" if owner else ""
            raise ExperimentError(f"{place}: there is no setting '{name}'{of}{choices_message(name, settings)}")
        judge = _appended if name != key else _value
        merged[name] = judge(settings[name], place, value, merged.get(name), is_option)
    return merged


def _appended(setting: Setting, path: str, value: Any, before: Any, is_option: bool) -> Any:
    if setting.hint.items is None or before is UNKNOWN:
        return UNKNOWN
    value = _loaded(path, value)
    old = before if isinstance(before, list) else [] if before is None else [before]
    item = Setting(setting.hint.items)
    return old + [_value(item, path, new, None) for new in (value if isinstance(value, list) else [value])]


def _value(setting: Setting, path: str, value: Any, before: Any, is_option: bool = False) -> Any:
    """A value, checked: a class as Chosen, a list of them, UNKNOWN, or the value itself."""
    hint = setting.hint
    if isinstance(value, Chosen):
        return value._replace(filled=hint.filled(path, value.cls))
    if value == "" and path in NEVER_EMPTY:
        raise ExperimentError(f"{path}: '' is empty. Give a name, or leave the option out.")
    if value is None and setting.group:
        raise ExperimentError(f"{path}: it is empty, expected settings, NAME: VALUE")
    if value is UNKNOWN or value is None or hint.accepts(value):
        return value
    # jsonargparse takes the path of a file for classes and for lists.
    if isinstance(value, str) and os.path.isfile(value) and (hint.takes_classes or "[" in hint.shown):
        _loaded(path, read_text(value))  # only so that nobody walks a huge one
        return UNKNOWN
    if isinstance(value, str) and hint.takes_classes:
        value, is_option = _loaded(path, value), False
    if value is None:
        return None
    if setting.group and not isinstance(value, dict):
        raise ExperimentError(f"{path}: '{value}' does not fit: expected settings, NAME: VALUE")
    if isinstance(value, list) and hint.items:
        if None in value and not hint.items.accepts(None):
            raise hint.items.misfit(path, None)
        old = before if isinstance(before, list) and len(before) == len(value) else [None] * len(value)
        return [_value(Setting(hint.items), path, item, last) for item, last in zip(value, old, strict=True)]
    if isinstance(value, dict) and is_option and hint.items and isinstance(before, list) and before:
        return [*before[:-1], _value(Setting(hint.items), path, value, before[-1], is_option)]
    if isinstance(value, dict | str) and hint.bases:
        given = {"class_path": value} if isinstance(value, str) else _undotted(value)
        return _class(setting, path, given, before, is_option)
    if not hint.is_clear and "{" in str(value):
        return UNKNOWN
    raise hint.misfit(path, value)


def _class(setting: Setting, path: str, given: dict[str, Any], before: Any, is_option: bool) -> Any:
    """The class that the value names, or that is there already, with the settings given to it."""
    own = given.keys() - SPEC
    if own and len(own) < len(given):
        raise ExperimentError(f"{path}: '{min(own)}' stands beside class_path or init_args, expected in init_args")
    if "class_path" in given:
        cls = setting.hint.find(path, str(given["class_path"]))
    elif isinstance(before, Chosen):
        cls = before.cls
    else:
        cls = None if before is UNKNOWN or isinstance(before, list) else _implied(setting, path, given)
    arguments = given if own else _loaded(path, given.get("init_args", {}))
    if cls is None or arguments is UNKNOWN:
        return UNKNOWN
    if not isinstance(arguments, dict):
        raise ExperimentError(f"{path}: '{arguments}' does not fit: expected init_args to hold settings, NAME: VALUE")
    chosen = Chosen(cls, setting.hint.filled(path, cls, given.get("class_path")), {})
    if isinstance(kwargs := given.get("dict_kwargs"), dict):  # for what is in no signature
        arguments = arguments | {name: value for name, value in kwargs.items() if name in chosen.settings}
    old = {}
    if isinstance(before, Chosen):
        old = before.given if before.cls is cls else _kept(chosen.settings, before.given)
    return chosen._replace(given=_merged(chosen.settings, path, arguments, old, is_option, cls))


def _implied(setting: Setting, path: str, given: dict[str, Any]) -> type | None:
    """The class that settings are for where none was named: the default, or else the one that is expected."""
    if setting.group:
        return setting.group
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


def _kept(settings: dict[str, Setting], given: dict[str, Any]) -> dict[str, Any]:
    """What stays of a class's settings when another class takes its place: what that one takes too."""
    kept = {}
    for name in given.keys() & settings.keys():
        with suppress(ExperimentError):
            kept[name] = _value(settings[name], name, given[name], None)
    return kept


def _require(settings: dict[str, Setting], path: str, given: dict[str, Any], owner: type | None = None) -> None:
    for name, setting in settings.items():
        if setting.is_required and given.get(name) is None:
            where = f"{path}: the setting '{name}' is missing, which {owner.__name__} requires" if owner else None
            raise ExperimentError(where or f"the setting '{name}' is missing. Start from a config: --config CONFIG")
        value = given.get(name)
        for chosen in value if isinstance(value, list) else [value]:
            if isinstance(chosen, Chosen):
                _require(chosen.settings, f"{path}.{name}".lstrip("."), chosen.given, chosen.cls)


def _undotted(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with `a.b: 1` as `a: {b: 1}`."""
    nested: dict[str, Any] = {}
    for key, value in given.items():
        name, _, rest = str(key).partition(".")
        before = nested.get(name)
        nested[name] = {**(before if isinstance(before, dict) else {}), rest: value} if rest else value
    return nested


def _loaded(path: str, value: Any) -> Any:
    """A value as jsonargparse reads it: a text may hold a mapping or a list, or be the path of a file with one."""
    if not isinstance(value, str) or not value.strip():
        return value
    if os.path.isfile(value):
        return UNKNOWN
    with suppress(NoYAMLError):
        loaded = load_yaml(value, path)
        return loaded if loaded is None or isinstance(loaded, dict | list) else value
    return value
