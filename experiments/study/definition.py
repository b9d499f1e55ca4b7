"""What a study is: a YAML with a base config, arms, seeds and a metric, and maybe an axis and panels."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from experiments.core.configs import load_yaml, read_text
from experiments.core.errors import ExperimentError, choices_message
from experiments.study.candidates import Search, read_search
from experiments.study.checks import are_equal, is_digits, is_number, mapping, read_seeds, refuse_own, refuse_unknown

Mode = Literal["min", "max"]
Settings = dict[str, Any]
_STAGES = ("test/", "val/")
PARAMETERS = "parameters"  # the x that is counted, and not set
_KEYS = (
    "base", "settings", "arms", "seeds", "metric", "published", "draw", "search", "cluster",
    "axis", "panels", "panel", "x", "goal", "keep",
)  # fmt: skip
_OF_CURVES = ("axis", "panels", "panel", "goal")


class Metric(NamedTuple):
    """What the arms are compared by."""

    name: str  # as logged: test/NAME or val/NAME, of the best checkpoint; a * in it stands for the x of each
    mode: Mode | None  # None: the task's monitor knows


class Published(NamedTuple):
    """A number from elsewhere, to stand beside ours."""

    value: float
    source: str


class Cluster(NamedTuple):
    """What one run takes on a cluster."""

    cpus: float = 1
    gpus: float = 0
    retries: int = 3  # after the death of a worker


class Axis(NamedTuple):
    """A setting, and the values that it takes in turn."""

    setting: str
    values: list[Any]


class Condition(NamedTuple):
    """What a study compares: an arm, in one panel, at one value of its axis."""

    panel: str  # "" where there are none
    arm: str
    level: float | str | None  # None where there is no axis, too


class Study(NamedTuple):
    """A study's definition, see `read_study`."""

    path: Path
    base: Path
    settings: Settings  # of all arms, over the base
    arms: dict[str, Settings]  # an arm's settings over those, by its name
    seeds: list[int]
    metric: Metric | None  # None: the task's monitor, in the test
    published: dict[str, Published]  # by arm
    draw: list[str]  # what the runs recorded beside the metric
    search: Search | None
    cluster: Cluster
    axes: dict[str, Axis | None]  # by arm
    panels: dict[str, Settings]  # over those of all arms, and under the arm's
    panel: str = ""  # what the panels differ in
    x: str | None = None  # what the metric is drawn over; None: the arms stand beside each other
    goal: float | None = None
    keep: bool = True  # the runs' folders

    def conditions(self) -> dict[Condition, list[Settings]]:
        """What is compared, each with its settings, one over the other."""
        found: dict[Condition, list[Settings]] = {}
        for panel, of_panel in self.panels.items():
            for arm, of_arm in self.arms.items():
                axis = self.axes.get(arm)
                for level in axis.values if axis else [None]:
                    of_level = {axis.setting: level} if axis else {}
                    found[Condition(panel, arm, level)] = [self.settings, of_panel, of_arm, of_level]
        return found


def read_study(path: Path) -> Study:
    """The study that a YAML file defines.

    Its keys: `base`, a config, found beside the file; `arms`, names with the settings of each over the base, nested or
    dotted, none for the base itself; `seeds`, a list. And optionally `settings`, of all arms; `metric`, a logged
    name or `{name, mode}`; `published`, `{value, source}` by arm; `draw`, a list of logged names, as val/loss, and of
    files of histograms, as activations; `search`, see `read_search`; `cluster`, `{cpus, gpus, retries}` of one run;
    `keep: false` where a run leaves its result alone, and no folder.

    With `x`, the metric is drawn over it: `parameters`, or a word for what varies. Then there may be `axis`, one
    setting with its values, smallest first, of all arms, or within an arm of that alone; `panels`, names with settings,
    and `panel`, what these differ in; `goal`: an axis is left at the first value whose mean over the seeds is as good;
    and a metric such as test/accuracy_*, of which one run has many.

    Raises: ExperimentError for a file that is none of this.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ExperimentError(f"study: '{path}' {what}, expected a YAML file.")
    given = mapping(load_yaml(read_text(str(path)), f"study: '{path}'"), f"study: '{path}'")
    refuse_unknown(given, _KEYS, "")
    for key in ("base", "arms", "seeds"):
        if given.get(key) is None:
            raise ExperimentError(f"study: '{path}': the key '{key}' is missing, expected base, arms and seeds.")
    base = path.parent / str(given["base"])
    if not base.is_file():
        raise ExperimentError(f"study: base: '{given['base']}' does not exist in {path.parent.absolute()}.")
    arms = _named(given["arms"], "arms", "arm", "'LSTM: {model.network.recurrent.cell: LSTMCell}'")
    axes = {name: _axis(settings.pop("axis", given.get("axis")), name) for name, settings in arms.items()}
    example = "'8: {data.x_features: 8}'"
    panels = {"": {}} if (of := given.get("panels")) is None else _named(of, "panels", "panel", example)
    study = Study(
        path,
        base,
        _settings(given.get("settings"), "settings"),
        arms,
        read_seeds(given["seeds"]),
        _metric(given.get("metric")),
        _published(given.get("published"), arms),
        _draw(given.get("draw")),
        read_search(given.get("search"), given["seeds"]),
        _cluster(given.get("cluster")),
        axes,
        panels,
        given.get("panel", ""),
        given.get("x"),
        given.get("goal"),
        given.get("keep", True),
    )
    _check_curves(study, given)
    return study


def _check_curves(study: Study, given: Mapping[str, Any]) -> None:
    """Raises ExperimentError for what cannot be drawn over x: better now than after the runs."""
    for key, kind, what in (("keep", bool, "true or false"), ("x", str | None, "a name"), ("panel", str, "a name")):
        if not isinstance(value := getattr(study, key), kind):
            raise ExperimentError(f"study: {key}: got {value!r}, expected {what}.")
    is_many, has_axis = study.metric is not None and "*" in study.metric.name, any(study.axes.values())
    what = next((key for key in _OF_CURVES if given.get(key) is not None), "axis" if has_axis else None)
    if study.x is None and (what or is_many):
        raise ExperimentError(
            f"study: {what or 'metric: a *'}: the key 'x' is missing, expected what the metric is drawn over: "
            f"{PARAMETERS}, or a word for what varies."
        )
    if study.x is not None and study.published:
        raise ExperimentError("study: published: an arm has a number for each x, expected no x, or nothing published.")
    if is_many and (has_axis or study.goal is not None):
        raise ExperimentError("study: metric: the * gives x its values, expected no axis and no goal.")
    if study.goal is not None and (not is_number(study.goal) or not has_axis):
        raise ExperimentError(f"study: goal: got {study.goal!r}, expected a number, and an axis to reach it on.")
    if study.goal is not None and study.panels.keys() != {""}:
        for panel in study.panels:
            if not is_digits(panel) or float(panel) == 0:
                raise ExperimentError(f"study: panels: got '{panel}', expected numbers, over which the goal is drawn.")
    if study.x not in (None, PARAMETERS) and not is_many:
        for condition in study.conditions():
            if not is_number(condition.level):
                raise ExperimentError(
                    f"study: {condition.arm}: got {condition.level!r} for x, expected numbers on an axis. Or let x be "
                    f"{PARAMETERS}."
                )
    if not study.keep and study.draw:
        raise ExperimentError("study: draw: what the runs recorded is in their folders, expected no keep: false.")


def _named(given: Any, place: str, what: str, example: str) -> dict[str, Settings]:
    expected = f"expected a name for each {what}, with its settings: {example}."
    if not isinstance(given, dict) or not given:
        raise ExperimentError(f"study: {place}: got {given!r}, {expected}")
    for name in given:
        is_name = isinstance(name, str) or (what == "panel" and is_number(name))
        if not is_name or not str(name).strip() or len(str(name).splitlines()) > 1:
            raise ExperimentError(f"study: {place}: {name!r} is no name, {expected}")
    return {str(name): _settings(settings, f"{place}: {name}") for name, settings in given.items()}


def _axis(given: Any, arm: str) -> Axis | None:
    if given is None:
        return None
    if not isinstance(given, dict) or len(given) != 1 or not all(isinstance(v, list) and v for v in given.values()):
        raise ExperimentError(f"study: {arm}: axis: got {given!r}, expected one setting with a list of values.")
    [(setting, values)] = given.items()
    refuse_own(setting, f"study: {arm}: axis: {setting}")
    if any(isinstance(value, list | dict) for value in values) or are_equal(values):
        raise ExperimentError(f"study: {arm}: axis: got {given!r}, expected numbers or names, all different.")
    return Axis(str(setting), values)


def _settings(given: Any, place: str) -> Settings:
    settings = {} if given is None else mapping(given, f"study: {place}")
    for key in _dotted(settings):
        refuse_own(key, f"study: {place}: {key}")
    return {str(key): value for key, value in settings.items()}


def _dotted(settings: Mapping[Any, Any], above: str = "") -> list[str]:
    keys = []
    for key, value in settings.items():
        keys.append(f"{above}{key}")
        keys += _dotted(value, f"{above}{key}.") if isinstance(value, dict) else []
    return keys


def _metric(given: Any) -> Metric | None:
    if given is None:
        return None
    whole = {"name": given} if isinstance(given, str) else mapping(given, "study: metric")
    refuse_unknown(whole, ("name", "mode"), "metric: ")
    name, mode = whole.get("name"), whole.get("mode")
    if not isinstance(name, str) or not name.startswith(_STAGES):
        raise ExperimentError(f"study: metric: got {name!r}, expected a logged name, test/NAME or val/NAME.")
    if mode not in (None, *get_args(Mode)):
        raise ExperimentError(f"study: metric: mode: got {mode!r}, expected min or max.")
    return Metric(name, mode)


def _published(given: Any, arms: Mapping[str, Any]) -> dict[str, Published]:
    published = {}
    for arm, number in ({} if given is None else mapping(given, "study: published")).items():
        place = f"published: {arm}: "
        if arm not in arms:
            raise ExperimentError(f"study: {place}there is no such arm{choices_message(str(arm), arms)}")
        refuse_unknown(mapping(number, f"study: {place[:-2]}"), ("value", "source"), place)
        value, source = number.get("value"), number.get("source")
        if not is_number(value) or not math.isfinite(value) or not isinstance(source, str) or not source.strip():
            raise ExperimentError(f"study: {place}got {number!r}, expected {{value: NUMBER, source: TEXT}}.")
        published[arm] = Published(float(value), source)
    return published


def _draw(given: Any) -> list[str]:
    names = [] if given is None else given
    expected = "expected a list of logged names, train/NAME or val/NAME, and of files of histograms, as activations."
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ExperimentError(f"study: draw: got {given!r}, {expected}")
    for name in names:
        if "/" in name and not name.startswith(("train/", "val/")):
            raise ExperimentError(f"study: draw: '{name}' is no curve, {expected}")
    return names


def _cluster(given: Any) -> Cluster:
    whole = {} if given is None else mapping(given, "study: cluster")
    refuse_unknown(whole, Cluster._fields, "cluster: ")
    for key, value in whole.items():
        least = 1 if key == "cpus" else 0
        if not is_number(value) or not least <= value < math.inf or (key == "retries" and type(value) is not int):
            raise ExperimentError(f"study: cluster: {key}: got {value!r}, expected a number of at least {least}.")
    return Cluster(**whole)
