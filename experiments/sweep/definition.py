"""What a sweep is: a YAML with a base config, panels, arms, the sizes that are swept, seeds, and a metric."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.core.configs import expanded, load_yaml, read_text
from experiments.core.errors import ExperimentError, choices_message

Settings = dict[str, Any]
_REQUIRED = ("base", "arms", "seeds", "metric", "x")
_KEYS = (*_REQUIRED, "settings", "panels", "panel", "sweep", "goal")


class Sweep(NamedTuple):
    """A sweep's definition, see `read_sweep`."""

    base: Path
    settings: Settings  # of all runs
    panels: dict[str, Settings]
    panel: str  # what the panels differ in
    arms: dict[str, Settings]
    sweeps: dict[str, Settings]  # by arm: one setting with its values, smallest first; or none
    seeds: list[int]
    metric: str  # as logged; a * in it stands for the x of several curves' points
    x: str  # what the horizontal axis is: "parameters", or a word for what is swept
    goal: float | None


class Cell(NamedTuple):
    """One run."""

    panel: str
    arm: str
    size: Any  # the value of the swept setting; None, too, where none is swept
    seed: int
    options: tuple[str, ...]  # of `fit`
    key: str  # of what decides the run's rows


def read_sweep(path: Path) -> Sweep:
    """The sweep that a YAML file defines.

    Its keys: `base`, a config, found beside the file; `arms`, names with the settings of each over the base; `seeds`, a
    list; `metric`, such as test/nmse, or test/accuracy_* for the points of a curve that one run gives; `x`, what the
    horizontal axis is. And optionally `settings`, of all runs; `panels`, names with settings, and `panel`, what these
    differ in; `sweep`, one setting with a list of values, for all arms, or within an arm for that alone; `goal`: a
    sweep is left at the first value whose mean over the seeds is at most that.

    Raises: ExperimentError for a file that is none of this.
    """
    given = _read(path)
    base = path.parent / str(given["base"])
    if not base.is_file():
        raise ExperimentError(f"sweep: base: '{given['base']}' does not exist in {path.parent.absolute()}.")
    arms = {name: dict(settings) for name, settings in _mapping(given["arms"], "arms").items()}
    sweep = Sweep(
        base=base,
        settings=given.get("settings") or {},
        panels=_mapping(given.get("panels") or {"": {}}, "panels"),
        panel=given.get("panel", ""),
        arms=arms,
        sweeps={name: _swept(arm.pop("sweep", given.get("sweep")), name) for name, arm in arms.items()},
        seeds=given["seeds"],
        metric=given["metric"],
        x=given["x"],
        goal=given.get("goal"),
    )
    _check_kinds(sweep)
    _check_axes(sweep)
    return sweep


def cells(sweep: Sweep, panel: str, arm: str) -> Iterator[list[Cell]]:
    """The runs of a curve: for each point, smallest first, one of each seed."""
    common = {**sweep.settings, **sweep.panels[panel], **sweep.arms[arm]}
    [(setting, sizes)] = sweep.sweeps[arm].items() or [("", [None])]
    for size in sizes:
        settings = {**common, setting: size} if setting else common
        options = tuple(f"--config={_inline({key: value})}" for key, value in settings.items())
        yield [Cell(panel, arm, size, seed, options, _key(sweep, options, size, seed)) for seed in sweep.seeds]


def is_number(text: str) -> bool:
    """Whether these are digits, with a point among them or not."""
    return text.replace(".", "", 1).isdecimal()


def _read(path: Path) -> Settings:
    """The file's keys: all that must be there, and none that is not known."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ExperimentError(f"sweep: '{path}' {what}, expected a YAML file.")
    given = load_yaml(read_text(str(path)), f"sweep: '{path}'")
    if not isinstance(given, dict):
        raise ExperimentError(f"sweep: '{path}' holds no settings, expected lines of NAME: VALUE.")
    for key in given:
        if key not in _KEYS:
            raise ExperimentError(f"sweep: there is no key '{key}'{choices_message(str(key), _KEYS)}")
    for key in _REQUIRED:
        if not given.get(key):
            raise ExperimentError(f"sweep: '{path}': the key '{key}' is missing, expected {', '.join(_REQUIRED)}.")
    return given


def _check_kinds(sweep: Sweep) -> None:
    """Raises ExperimentError for a word where a number belongs, and the like."""
    for key, name in {"metric": sweep.metric, "x": sweep.x}.items():
        if not isinstance(name, str):
            raise ExperimentError(f"sweep: {key}: got {name!r}, expected a name.")
    if not isinstance(sweep.settings, dict):
        raise ExperimentError(f"sweep: settings: got {sweep.settings!r}, expected lines of NAME: VALUE.")
    if sweep.goal is not None and type(sweep.goal) not in (int, float):
        raise ExperimentError(f"sweep: goal: got {sweep.goal!r}, expected a number.")
    seeds = sweep.seeds
    if not isinstance(seeds, list) or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ExperimentError(f"sweep: seeds: got {seeds!r}, expected a list of different whole numbers.")


def _check_axes(sweep: Sweep) -> None:
    """Raises ExperimentError for what cannot be drawn: better now than after the runs."""
    for panel in sweep.panels if sweep.goal is not None else ():
        if not is_number(panel) or float(panel) == 0:
            raise ExperimentError(f"sweep: panels: got '{panel}', expected numbers, over which the goal is drawn.")
    if sweep.x == "parameters" or "*" in sweep.metric:
        return
    for arm, swept in sweep.sweeps.items():
        for size in next(iter(swept.values()), [None]):
            if type(size) not in (int, float):
                raise ExperimentError(
                    f"sweep: {arm}: got {size!r} for x, expected numbers to be swept. Or let x be parameters."
                )


def _mapping(given: Any, place: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(settings, dict | None) for settings in given.values()):
        raise ExperimentError(f"sweep: {place}: got {given!r}, expected names, with the settings of each.")
    return {str(name): settings or {} for name, settings in given.items()}


def _swept(given: Any, arm: str) -> Settings:
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) != 1 or not all(isinstance(v, list) and v for v in given.values()):
        raise ExperimentError(f"sweep: {arm}: got {given!r}, expected one setting with a list of values.")
    [values] = given.values()
    if len({str(value) for value in values}) < len(values):
        raise ExperimentError(f"sweep: {arm}: got {given!r}, expected different values.")
    return given


def _inline(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(settings, default_flow_style=True, width=float("inf")).strip()


def _key(sweep: Sweep, options: tuple[str, ...], size: Any, seed: int) -> str:
    """A hash of what decides a run's rows: the files of its config, its options and seed, and what is kept of it."""
    files = [Path(argument.partition("=")[2]).read_bytes() for argument in expanded(["--config", str(sweep.base)])]
    decisive = (files, options, seed, sweep.metric, sweep.x, size)
    return hashlib.blake2b(repr(decisive).encode(), digest_size=6).hexdigest()
