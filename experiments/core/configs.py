"""The ready configs: where they lie, what they say of themselves, and those that build on another."""

import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from experiments.core.errors import ExperimentError

CONFIGS = Path(__file__).parent.parent / "configs"

# Far above any config, and far below what takes a minute or a gigabyte to walk.
_LONGEST, _MOST_VALUES, _DEEPEST = 1_000_000, 100_000, 100


class NoYAMLError(ExperimentError):
    """A text that is no YAML."""


def ready_configs() -> dict[str, list[Path]]:
    """The configs that a run can start from, by the folder that they lie in; `_NAME.yaml` is for others to build on."""
    ready: dict[str, list[Path]] = {}
    for path in sorted(CONFIGS.glob("*/[!_]*.yaml")):
        ready.setdefault(path.parent.name, []).append(path)
    return ready


def first_line(config: Path) -> str:
    """What the config says of itself: its first line, a comment."""
    return config.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def expanded(argv: Sequence[str]) -> list[str]:
    """The arguments, with each `--config FILE` preceded by those that the file builds on, `base: OTHER.yaml`.

    A base is found beside the file that names it. And `--a.b=null` becomes `--config={a: {b: null}}`, since
    jsonargparse would hand the null down as the text 'None'.
    Raises ExperimentError for configs that build on each other in a circle, and for a file that `read_config` cannot
    read.
    """
    whole: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-c", "--config"):
            if (file := next(arguments, None)) is None:
                raise ExperimentError(f"{argument}: a file must follow it.")
            whole += _chain(file)
        elif argument.startswith(("-c=", "--config=")):
            whole += _chain(argument.partition("=")[2])
        elif argument.partition("=")[0] == "--base":
            raise ExperimentError("--base: a config names its own base. Give both: --config BASE --config CONFIG.")
        elif argument.startswith(("--model.", "--data.")) and argument.endswith("=null"):
            name = argument.removeprefix("--").removesuffix("=null")
            whole.append(f"--config={{{name.replace('.', ': {')}: null{'}' * (name.count('.') + 1)}")
        else:
            whole.append(argument)
    return whole


def read_config(config: str) -> dict[str, Any] | None:
    """The settings that `--config CONFIG` names: those of a YAML file, or written out in its place.

    None for what can be read once only, or from afar: the standard input and URLs.
    Raises ExperimentError for a file that is missing, too large or no YAML, and for anything but settings in it.
    """
    if config == "-" or "://" in config:
        return None
    if not os.path.isfile(config):
        if os.path.exists(config):
            raise ExperimentError(f"config: '{config}' is no file, expected a YAML file.")
        if ": " in config and isinstance(settings := load_yaml(config, "config"), dict):
            return settings
        ready = {path.name: os.path.relpath(path) for paths in ready_configs().values() for path in paths}
        if nearest := get_close_matches(f"{Path(config).stem}.yaml", ready, n=1, cutoff=0.5):
            raise ExperimentError(f"config: '{config}' does not exist. Did you mean '{ready[nearest[0]]}'?")
        raise ExperimentError(f"config: '{config}' does not exist. Ready are {', '.join(ready.values())}")
    settings = load_yaml(read_text(config), f"config: '{config}'")
    if not isinstance(settings, dict):
        raise ExperimentError(f"config: '{config}' holds no settings, expected lines of NAME: VALUE.")
    return settings


def read_text(path: str) -> str:
    """The text of a YAML file. Raises ExperimentError where it cannot be read, is no text, or is too large."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except OSError as error:
        raise ExperimentError(f"config: '{path}' cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ExperimentError(f"config: '{path}' is not text in UTF-8, expected a YAML file.") from error
    if len(text) > _LONGEST:
        raise ExperimentError(f"config: '{path}' is larger than {_LONGEST:,} characters, expected a YAML file.")
    return text


def load_yaml(text: str, source: str) -> Any:
    """What the YAML says, as jsonargparse reads it.

    Raises NoYAMLError, or ExperimentError for what would be endless or huge when walked; both begin with the source.
    """
    # Imported here because --help must not wait for it.
    from jsonargparse import get_loader

    try:
        check_extent(text, source)
        _check_keys(yaml.compose(text, yaml.SafeLoader), source)
        return get_loader("yaml")(text)
    except yaml.MarkedYAMLError as error:
        saying = [(error.context, error.context_mark), (error.problem, error.problem_mark)]
        places = [f"{what} at line {mark.line + 1}, column {mark.column + 1}" for what, mark in saying if what and mark]
        raise NoYAMLError(f"{source}: no YAML: {', '.join(places)}") from error
    # A tag such as !!bool raises whatever its value causes.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise NoYAMLError(f"{source}: no YAML: {type(error).__name__}, {reason}") from error


def check_extent(text: str, source: str) -> None:
    """Raises ExperimentError for too many values or levels, where those of an anchor count wherever it is used.

    Neither would come to an end otherwise: libyaml recurses until the process dies.
    """
    anchored: dict[str | None, tuple[int, int]] = {}
    inside: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # anchor, values and levels of each open collection
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, 1, 1))
            part = None, 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            part = inside.pop()
        elif isinstance(event, yaml.NodeEvent):
            part = event.anchor, *anchored.get(event.anchor if isinstance(event, yaml.AliasEvent) else None, (1, 1))
        else:
            continue
        anchor, values, levels = part
        if isinstance(event, yaml.AliasEvent) and any(anchor == above for above, _, _ in inside):
            raise ExperimentError(f"{source}: the anchor '{anchor}' holds itself.")
        if anchor is not None:
            anchored[anchor] = values, levels
        above, total, height = inside.pop()
        inside.append((above, total + values, max(height, levels + 1)))
        if total + values > _MOST_VALUES or len(inside) + levels > _DEEPEST:
            raise ExperimentError(
                f"{source}: more than {_MOST_VALUES:,} values or {_DEEPEST} levels, with its anchors written out."
            )


def _check_keys(node: yaml.Node | None, source: str) -> None:
    """Raises ExperimentError for a key that stands twice in a mapping: YAML would take the last one silently."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ExperimentError(f"{source}: '{twice[0]}' stands twice in one place, line {node.start_mark.line + 1}.")
        for _, value in node.value:
            _check_keys(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, source)


def _chain(config: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    file = os.path.realpath(config)
    if file in above:
        raise ExperimentError(f"{config}: the configs build on each other in a circle (base).")
    base = (read_config(config) or {}).get("base")
    if isinstance(base, str):
        folder = Path(config).parent if os.path.isfile(config) else Path()
        if not (folder / base).is_file():
            raise ExperimentError(f"{config}: its base '{base}' does not exist in {folder.absolute()}.")
        yield from _chain(str(folder / base), (*above, file))
    yield f"--config={config}"
