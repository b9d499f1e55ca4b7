"""What a study is: a YAML with a base config, arms, seeds and a metric."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from experiments.core.configs import load_yaml, read_text
from experiments.core.errors import ExperimentError, choices_message

Mode = Literal["min", "max"]
_STAGES = ("test/", "val/")
MAX_STEPS = "trainer.max_steps"
# The study says these itself, for each run.
_OWN = ("seed_everything", "name", "ckpt_path", "config", "base", "trainer.default_root_dir", "trainer.fast_dev_run")


class Metric(NamedTuple):
    """What the arms are compared by."""

    name: str  # as logged: test/NAME or val/NAME, of the best checkpoint
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


class Search(NamedTuple):
    """A setting of which each arm gets the best value."""

    setting: str
    values: list[float | str]
    seeds: list[int]  # none of the study's
    max_steps: int | None = None  # of its runs; None: as many as the study's


class Study(NamedTuple):
    """A study's definition, see `read_study`."""

    path: Path
    base: Path
    settings: dict[str, Any]  # of all arms, over the base
    arms: dict[str, dict[str, Any]]  # an arm's settings over those, by its name
    seeds: list[int]
    metric: Metric | None  # None: the task's monitor, in the test
    published: dict[str, Published]  # by arm
    draw: list[str]  # what the runs recorded beside the metric
    search: Search | None
    cluster: Cluster


def read_study(path: Path) -> Study:
    """The study that a YAML file defines.

    Its keys: `base`, a config, found beside the file; `arms`, names with the settings of each over the base, nested or
    dotted, none for the base itself; `seeds`, a list. And optionally `settings`, of all arms; `metric`, a logged
    name or `{name, mode}`; `published`, `{value, source}` by arm; `draw`, a list of logged names, as val/loss, and of
    files of histograms, as activations; `search`, `{setting, values, seeds, max_steps}`: each arm gets the value that
    is best in validation with these seeds, after so many steps; `cluster`, `{cpus, gpus, retries}` of one run.

    Raises: ExperimentError for a file that is none of this.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ExperimentError(f"study: '{path}' {what}, expected a YAML file.")
    given = _mapping(load_yaml(read_text(str(path)), f"study: '{path}'"), f"study: '{path}'")
    _refuse_unknown(
        given, ("base", "settings", "arms", "seeds", "metric", "published", "draw", "search", "cluster"), ""
    )
    for key in ("base", "arms", "seeds"):
        if given.get(key) is None:
            raise ExperimentError(f"study: '{path}': the key '{key}' is missing, expected base, arms and seeds.")
    base = path.parent / str(given["base"])
    if not base.is_file():
        raise ExperimentError(f"study: base: '{given['base']}' does not exist in {path.parent.absolute()}.")
    arms = _arms(given["arms"])
    return Study(
        path,
        base,
        _settings(given.get("settings"), "settings"),
        arms,
        _seeds(given["seeds"]),
        _metric(given.get("metric")),
        _published(given.get("published"), arms),
        _draw(given.get("draw")),
        _search(given.get("search"), given["seeds"]),
        _cluster(given.get("cluster")),
    )


def _mapping(value: Any, place: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ExperimentError(f"{place}: got {value!r}, expected lines of NAME: VALUE.")
    return value


def _refuse_unknown(given: Mapping[Any, Any], known: tuple[str, ...], place: str) -> None:
    for key in given:
        if key not in known:
            raise ExperimentError(f"study: {place}there is no key '{key}'{choices_message(str(key), known)}")


def _arms(given: Any) -> dict[str, dict[str, Any]]:
    expected = "expected a name for each arm, with its settings: 'LSTM: {model.network.recurrent.cell: LSTMCell}'."
    if not isinstance(given, dict) or not given:
        raise ExperimentError(f"study: arms: got {given!r}, {expected}")
    for name in given:
        if not isinstance(name, str) or not name.strip() or len(name.splitlines()) > 1:
            raise ExperimentError(f"study: arms: {name!r} is no name, {expected}")
    return {name: _settings(settings, f"arms: {name}") for name, settings in given.items()}


def _settings(given: Any, place: str) -> dict[str, Any]:
    settings = {} if given is None else _mapping(given, f"study: {place}")
    for key in _dotted(settings):
        refuse_own(key, f"study: {place}: {key}")
    return {str(key): value for key, value in settings.items()}


def refuse_own(key: str, place: str) -> None:
    """Raises ExperimentError for a setting that the study makes itself."""
    if key in _OWN:
        raise ExperimentError(f"{place}: the study itself sets '{key}' for each run. Take it out.")


def _dotted(settings: Mapping[Any, Any], above: str = "") -> list[str]:
    keys = []
    for key, value in settings.items():
        keys.append(f"{above}{key}")
        keys += _dotted(value, f"{above}{key}.") if isinstance(value, dict) else []
    return keys


def _seeds(given: Any, place: str = "seeds") -> list[int]:
    is_list = isinstance(given, list) and bool(given)
    if not is_list or any(type(seed) is not int or not 0 <= seed < 2**32 for seed in given):
        raise ExperimentError(f"study: {place}: got {given!r}, expected a list of whole numbers from 0 to {2**32 - 1}.")
    if twice := sorted({seed for seed in given if given.count(seed) > 1}):
        raise ExperimentError(f"study: {place}: {twice[0]} stands twice. Each seed is run once.")
    return given


def _metric(given: Any) -> Metric | None:
    if given is None:
        return None
    whole = {"name": given} if isinstance(given, str) else _mapping(given, "study: metric")
    _refuse_unknown(whole, ("name", "mode"), "metric: ")
    name, mode = whole.get("name"), whole.get("mode")
    if not isinstance(name, str) or not name.startswith(_STAGES):
        raise ExperimentError(f"study: metric: got {name!r}, expected a logged name, test/NAME or val/NAME.")
    if mode not in (None, *get_args(Mode)):
        raise ExperimentError(f"study: metric: mode: got {mode!r}, expected min or max.")
    return Metric(name, mode)


def _published(given: Any, arms: Mapping[str, Any]) -> dict[str, Published]:
    published = {}
    for arm, number in ({} if given is None else _mapping(given, "study: published")).items():
        place = f"published: {arm}: "
        if arm not in arms:
            raise ExperimentError(f"study: {place}there is no such arm{choices_message(str(arm), arms)}")
        _refuse_unknown(_mapping(number, f"study: {place[:-2]}"), ("value", "source"), place)
        value, source = number.get("value"), number.get("source")
        if not _is_number(value) or not math.isfinite(value) or not isinstance(source, str) or not source.strip():
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


def _search(given: Any, seeds: list[int]) -> Search | None:
    if given is None:
        return None
    whole = _mapping(given, "study: search")
    _refuse_unknown(whole, Search._fields, "search: ")
    setting, values = whole.get("setting"), whole.get("values")
    if not isinstance(setting, str) or not setting:
        raise ExperimentError(
            f"study: search: setting: got {setting!r}, expected one, as model.optimizer.init_args.lr."
        )
    refuse_own(setting, f"study: search: {setting}")
    are_values = isinstance(values, list) and all(isinstance(value, str) or _is_number(value) for value in values)
    if not are_values or len(values) < 2:
        raise ExperimentError(
            f"study: search: values: got {values!r}, expected a list of two or more numbers or names. Of one value "
            "there is nothing to find: put it into the study's settings."
        )
    if any(len(set(of)) < len(values) for of in (values, map(str, values))):
        raise ExperimentError(f"study: search: values: got {values!r}, expected all different, as text too.")
    own = _seeds(whole.get("seeds"), "search: seeds")
    if both := sorted(set(own) & set(seeds)):
        raise ExperimentError(f"study: search: seeds: {both[0]} is one of the study's too, expected other seeds.")
    steps = whole.get("max_steps")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ExperimentError(f"study: search: max_steps: got {steps!r}, expected a whole number of at least 1.")
    if steps is not None and setting == MAX_STEPS:
        raise ExperimentError(f"study: search: it searches for {MAX_STEPS}, expected no max_steps of its own.")
    return Search(setting, values, own, steps)


def _cluster(given: Any) -> Cluster:
    whole = {} if given is None else _mapping(given, "study: cluster")
    _refuse_unknown(whole, Cluster._fields, "cluster: ")
    for key, value in whole.items():
        least = 1 if key == "cpus" else 0
        if not _is_number(value) or not least <= value < math.inf or (key == "retries" and type(value) is not int):
            raise ExperimentError(f"study: cluster: {key}: got {value!r}, expected a number of at least {least}.")
    return Cluster(**whole)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
