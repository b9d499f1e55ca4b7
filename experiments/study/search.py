"""A study's search: every arm gets the best of several values of one setting, found with seeds of its own."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.core.errors import ExperimentError
from experiments.study.cells import Arm, Cell, resolved
from experiments.study.definition import MAX_STEPS, Search, Study
from experiments.study.outcomes import last_words


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
    left_out: dict[str, str]  # why, by the name of the arm
    first: str  # the study's first arm, left out or not
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
    arms = {f"{name}, {value}": (name, value) for name, value in tried}
    steps = {} if search.max_steps is None else {MAX_STEPS: search.max_steps}
    settings = {label: study.arms[name] | steps | {search.setting: value} for label, (name, value) in arms.items()}
    return [
        Trial(*of, arm, [Cell(arm, seed, folder) for seed in search.seeds])
        for of, arm in zip(tried, resolved(study._replace(arms=settings), changes, trusted), strict=True)
    ]


def searched(
    search: Search,
    of_trials: Sequence[Trial],
) -> Searched:
    """The best value for each arm: by the validation's monitor, of the best checkpoint, the mean over the seeds.

    An arm with a run that is not finished or was never validated is left out, and one that diverged with every value.
    """
    monitor, names = of_trials[0].arm.monitor, list(dict.fromkeys(trial.of for trial in of_trials))
    metric, sign = f"val/{monitor.name}", 1 if monitor.mode == "min" else -1
    found, left_out = [], {}
    for name in names:
        of_arm = [trial for trial in of_trials if trial.of == name]
        if why := _incomplete([cell for trial in of_arm for cell in trial.cells], metric):
            left_out[name] = why
            continue
        scores = [_score(trial, metric) for trial in of_arm]
        if all(map(math.isnan, scores)):
            left_out[name] = f"it diverged with every value of {search.setting}"
            continue
        best = min(range(len(scores)), key=lambda i: math.inf if math.isnan(scores[i]) else sign * scores[i])
        found.append(Found(name, scores, search.values[best]))
    return Searched(search, metric, found, left_out, names[0], [cell for trial in of_trials for cell in trial.cells])


def with_found(
    study: Study,
    result: Searched,
) -> Study:
    """The study of the arms that are not left out, each with the value that was found for it."""
    settings = {of.arm: {**study.arms[of.arm], result.search.setting: of.value} for of in result.found}
    return study._replace(arms=settings)


def _incomplete(cells: Sequence[Cell], metric: str) -> str:
    """What an arm's search is without; nothing where it is whole."""
    lacking = []
    for cell in cells:
        result = cell.result
        if result is None:
            lacking.append(f"{cell.label} is not finished ({last_words(cell) or 'not run'})")
        elif result["diverged_at"] is None and metric not in result["metrics"]:
            lacking.append(f"{cell.label} has no {metric}: no validation ran")
    return "; ".join(lacking)


def _score(trial: Trial, metric: str) -> float:
    """The mean over the runs, all finished; NaN where one diverged."""
    results = [result for cell in trial.cells if (result := cell.result) is not None]
    if any(result["diverged_at"] is not None for result in results):
        return math.nan
    return math.fsum(result["metrics"][metric] for result in results) / len(results)
