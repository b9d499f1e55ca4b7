"""A study's search: every arm gets the best of several values of some settings, found with seeds of its own."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.core.errors import ExperimentError
from experiments.study.arms import Arm, resolved, shown
from experiments.study.candidates import MAX_STEPS, Search
from experiments.study.definition import Condition, Settings, Study
from experiments.study.outcomes import last_words
from experiments.study.runs import Run

Candidate = tuple[float | str, ...]


class Trial(NamedTuple):
    """An arm of the study with one of the candidates."""

    of: Condition
    candidate: Candidate
    arm: Arm
    runs: list[Run]


class Found(NamedTuple):
    """What the search gave one arm."""

    of: Condition
    scores: list[float]  # by candidate: the mean over the seeds; NaN where a run diverged
    best: Candidate


class Searched(NamedTuple):
    """What the search gave all arms, and its runs."""

    search: Search
    metric: str  # of each run's best checkpoint, in validation
    found: list[Found]
    left_out: dict[str, str]  # why, by the label of the arm
    first: str  # the label of the study's first arm, left out or not
    runs: list[Run]


def trials(
    study: Study,
    changes: Sequence[str],  # see `resolved`
    folder: Path,
) -> list[Trial]:
    """The runs of the study's search: every arm with every candidate and each of the search's seeds.

    Raises: ExperimentError for mistakes, as `resolved`, and for a change of what is searched for.
    """
    search = study.search
    assert search is not None
    for change in changes:
        if (setting := change.partition("=")[0]) in search.settings:
            raise ExperimentError(f"study: --set {setting}: the study searches for it. Take one of them out.")
    steps: Settings = {} if search.max_steps is None else {MAX_STEPS: search.max_steps}
    tried, conditions = [], {}
    for of, parts in study.conditions().items():
        for candidate in search.candidates:
            tried.append((of, candidate))
            name = ", ".join(map(str, (of.arm, *candidate)))
            conditions[of._replace(arm=name)] = [*parts, steps, dict(zip(search.settings, candidate, strict=True))]
    return [
        Trial(*of, arm, [Run(arm, seed, folder) for seed in search.seeds])
        for of, arm in zip(tried, resolved(study, conditions, changes), strict=True)
    ]


def searched(
    search: Search,
    of_trials: Sequence[Trial],
) -> Searched:
    """The best candidate for each arm: by the validation's monitor, of the best checkpoint, the mean over the seeds.

    An arm with a run that is not finished or was never validated is left out, and one that diverged with every
    candidate.
    """
    monitor, conditions = of_trials[0].arm.monitor, list(dict.fromkeys(trial.of for trial in of_trials))
    metric, sign = f"val/{monitor.name}", 1 if monitor.mode == "min" else -1
    found, left_out = [], {}
    for of in conditions:
        of_arm = [trial for trial in of_trials if trial.of == of]
        if why := _incomplete([run for trial in of_arm for run in trial.runs], metric):
            left_out[shown(of)] = why
            continue
        scores = [_score(trial, metric) for trial in of_arm]
        if all(map(math.isnan, scores)):
            left_out[shown(of)] = f"it diverged with every value of {' and '.join(search.settings)}"
            continue
        best = min(range(len(scores)), key=lambda i: math.inf if math.isnan(scores[i]) else sign * scores[i])
        found.append(Found(of, scores, search.candidates[best]))
    every = [run for trial in of_trials for run in trial.runs]
    return Searched(search, metric, found, left_out, shown(conditions[0]), every)


def with_found(
    conditions: Mapping[Condition, Sequence[Settings]],
    result: Searched,
) -> dict[Condition, list[Settings]]:
    """The conditions that are not left out, each with what was found for it."""
    settings = result.search.settings
    return {of.of: [*conditions[of.of], dict(zip(settings, of.best, strict=True))] for of in result.found}


def _incomplete(runs: Sequence[Run], metric: str) -> str:
    """What an arm's search is without; nothing where it is whole."""
    lacking = []
    for run in runs:
        result = run.result
        if result is None:
            lacking.append(f"{run.label} is not finished ({last_words(run) or 'not run'})")
        elif result["diverged_at"] is None and metric not in result["metrics"]:
            lacking.append(f"{run.label} has no {metric}: no validation ran")
    return "; ".join(lacking)


def _score(trial: Trial, metric: str) -> float:
    """The mean over the runs, all finished; NaN where one diverged."""
    results: list[dict[str, Any]] = [result for run in trial.runs if (result := run.result) is not None]
    if any(result["diverged_at"] is not None for result in results):
        return math.nan
    return math.fsum(result["metrics"][metric] for result in results) / len(results)
