"""A study's search: every arm gets the best of several values of one setting, found with seeds of its own."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.core.errors import ExperimentError
from experiments.core.task import Monitor
from experiments.study.cells import Arm, Cell, resolved
from experiments.study.definition import Search, Study


class Trial(NamedTuple):
    """An arm of the study with one of the values."""

    of: str  # that arm's name
    value: float | str
    arm: Arm
    cells: list[Cell]


class Found(NamedTuple):
    """What the search gave one arm."""

    arm: str
    scores: list[float]  # by value: the mean over the seeds; NaN where a run diverged
    value: float | str  # the best


class Searched(NamedTuple):
    """What the search gave all arms, and its runs."""

    search: Search
    metric: str  # of each run's best checkpoint, in validation
    found: list[Found]
    cells: list[Cell]


def trials(
    study: Study,
    changes: Sequence[str],  # see `resolved`
    trusted: list[str],
    folder: Path,
) -> list[Trial]:
    """The runs of the study's search: every arm with every value and each of the search's seeds.

    Raises: ExperimentError for mistakes, as `resolved`, and for a change of what is searched for.
    """
    search = study.search
    assert search is not None
    if any(change.partition("=")[0] == search.setting for change in changes):
        raise ExperimentError(f"study: --set {search.setting}: the study searches for it. Take one of them out.")
    tried = [(name, value) for name in study.arms for value in search.values]
    arms = {
        f"{name}, {value:g}" if isinstance(value, float) else f"{name}, {value}": (name, value) for name, value in tried
    }
    settings = {label: {**study.arms[name], search.setting: value} for label, (name, value) in arms.items()}
    return [
        Trial(*of, arm, [Cell(arm, seed, folder) for seed in search.seeds])
        for of, arm in zip(tried, resolved(study._replace(arms=settings), changes, trusted), strict=True)
    ]


def searched(
    search: Search,
    of_trials: Sequence[Trial],
) -> Searched:
    """The best value for each arm: by the validation's monitor, of the best checkpoint, the mean over the seeds.

    Raises: ExperimentError where a run is not finished, and for an arm of which every value diverged.
    """
    monitor = of_trials[0].arm.monitor
    cells = [cell for trial in of_trials for cell in trial.cells]
    if missing := [cell.label for cell in cells if cell.result is None]:
        raise ExperimentError(f"study: search: not finished: {'; '.join(missing)}. Run the study first.")
    found = []
    for name in dict.fromkeys(trial.of for trial in of_trials):
        scores = [_score(trial, monitor) for trial in of_trials if trial.of == name]
        if all(map(math.isnan, scores)):
            raise ExperimentError(f"study: search: {name} diverged with every value of {search.setting}.")
        sign = 1 if monitor.mode == "min" else -1
        best = min(range(len(scores)), key=lambda i: math.inf if math.isnan(scores[i]) else sign * scores[i])
        found.append(Found(name, scores, search.values[best]))
    return Searched(search, f"val/{monitor.name}", found, cells)


def with_found(
    study: Study,
    result: Searched,
) -> Study:
    """The study whose arms have the values that were found for them."""
    settings = {of.arm: {**study.arms[of.arm], result.search.setting: of.value} for of in result.found}
    return study._replace(arms=settings)


def _score(trial: Trial, monitor: Monitor) -> float:
    scores = []
    for cell in trial.cells:
        assert cell.result is not None
        if cell.result["diverged_at"] is not None:
            return math.nan
        metric = f"val/{monitor.name}"
        if metric not in cell.result["metrics"]:
            raise ExperimentError(f"study: search: {cell.label} has no {metric}: no validation ran.")
        scores.append(cell.result["metrics"][metric])
    return math.fsum(scores) / len(scores)
