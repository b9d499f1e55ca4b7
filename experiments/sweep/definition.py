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
    size: Any  # the value of the swept setting; None where none is swept
    seed: int
    options: tuple[str, ...]  # of `fit`
    key: str  # of the settings and the seed


def read_sweep(path: Path) -> Sweep:
    """The sweep that a YAML file defines.

    Its keys: `base`, a config, found beside the file; `arms`, names with the settings of each over the base; `seeds`, a
    list; `metric`, such as test/nmse, or test/accuracy_* for the points of a curve that one run gives; `x`, what the
    horizontal axis is. And optionally `settings`, of all runs; `panels`, names with settings, and `panel`, what these
    differ in; `sweep`, one setting with a list of values, for all arms, or within an arm for that alone; `goal`: a
    sweep is left at the first value whose mean over the seeds is at most that.

    Raises: ExperimentError for a file that is none of this.
    """
    if not path.is_file():
        raise ExperimentError(f"sweep: '{path}' does not exist, expected a YAML file.")
    given = load_yaml(read_text(str(path)), f"sweep: '{path}'")
    if not isinstance(given, dict):
        raise ExperimentError(f"sweep: '{path}' holds no settings, expected lines of NAME: VALUE.")
    for key in given:
        if key not in _KEYS:
            raise ExperimentError(f"sweep: there is no key '{key}'{choices_message(str(key), _KEYS)}")
    for key in _REQUIRED:
        if not given.get(key):
            raise ExperimentError(f"sweep: '{path}': the key '{key}' is missing, expected {', '.join(_REQUIRED)}.")
    base = path.parent / str(given["base"])
    if not base.is_file():
        raise ExperimentError(f"sweep: base: '{given['base']}' does not exist in {path.parent.absolute()}.")
    arms = {name: dict(settings) for name, settings in _mapping(given["arms"], "arms").items()}
    sweeps = {name: _swept(arm.pop("sweep", given.get("sweep")), name) for name, arm in arms.items()}
    panels = _mapping(given.get("panels") or {"": {}}, "panels")
    for panel in panels if given.get("goal") is not None else ():
        if not panel.replace(".", "", 1).isdecimal():
            raise ExperimentError(f"sweep: panels: got '{panel}', expected numbers, over which the goal is drawn.")
    seeds = given["seeds"]
    if not isinstance(seeds, list) or len(set(seeds)) < len(seeds):
        raise ExperimentError(f"sweep: seeds: got {seeds!r}, expected a list of different whole numbers.")
    return Sweep(
        base, given.get("settings") or {}, panels, given.get("panel", ""), arms, sweeps, seeds,
        given["metric"], given["x"], given.get("goal"),
    )  # fmt: skip


def cells(sweep: Sweep, panel: str, arm: str) -> Iterator[list[Cell]]:
    """The runs of a curve: for each point, smallest first, one of each seed."""
    common = {**sweep.settings, **sweep.panels[panel], **sweep.arms[arm]}
    [(setting, sizes)] = sweep.sweeps[arm].items() or [("", [None])]
    for size in sizes:
        settings = common if size is None else {**common, setting: size}
        options = tuple(f"--config={_inline({key: value})}" for key, value in settings.items())
        yield [Cell(panel, arm, size, seed, options, _key(sweep.base, options, seed)) for seed in sweep.seeds]


def _mapping(given: Any, place: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(settings, dict | None) for settings in given.values()):
        raise ExperimentError(f"sweep: {place}: got {given!r}, expected names, with the settings of each.")
    return {str(name): settings or {} for name, settings in given.items()}


def _swept(given: Any, arm: str) -> Settings:
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) != 1 or not all(isinstance(v, list) and v for v in given.values()):
        raise ExperimentError(f"sweep: {arm}: got {given!r}, expected one setting with a list of values.")
    return given


def _inline(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(settings, default_flow_style=True, width=float("inf")).strip()


def _key(base: Path, options: tuple[str, ...], seed: int) -> str:
    """A hash of what decides a run's result: the files of its config, its options and its seed."""
    files = [Path(argument.partition("=")[2]).read_bytes() for argument in expanded(["--config", str(base)])]
    return hashlib.blake2b(repr((files, options, seed)).encode(), digest_size=6).hexdigest()
