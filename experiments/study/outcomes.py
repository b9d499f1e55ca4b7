"""What came of a study's runs, read from their files, and the rows that compare the arms."""

import math
from collections.abc import Iterable, Sequence
from enum import Enum
from statistics import median
from typing import Any, NamedTuple

from experiments.core.errors import ExperimentError, choices_message
from experiments.core.intervals import Estimate, estimate_of
from experiments.study.arms import Arm
from experiments.study.checks import is_digits
from experiments.study.definition import PARAMETERS, Metric, Mode, Published, Study
from experiments.study.runs import Run
from experiments.study.statistics import Difference, difference


class State(Enum):
    """How far a run is."""

    FINISHED = "finished"
    DIVERGED = "diverged"  # at some step its loss was no finite number: its score is of no trained network
    WITHOUT = "without the metric"
    UNFINISHED = "unfinished"
    MISSING = "missing"


class Outcome(NamedTuple):
    """What came of a run; of one whose metric has a *, for one of the numbers that this stands for."""

    run: Run
    state: State
    value: float | None  # of the metric, where it is finished or diverged after a validation
    result: dict[str, Any] | None
    note: str  # where it diverged, what it has for the metric, or the last that a run without a result said
    at: float | None = None  # the number


class Row(NamedTuple):
    """An arm beside the first, in the same panel and at the same x."""

    arm: Arm
    x: float | None  # where the metric is drawn over something; None, too, where it is not known
    values: list[float]  # of the finished runs
    are_all: bool  # whether every run finished
    mean: Estimate | None  # over the finished runs
    difference: Difference | None  # None for the first arm, and where it has no such x
    seeds_of_first: int
    parameters: int | None
    step_ms: float | None  # the median over the finished runs
    published: Published | None


def chosen_metric(study: Study, arms: Sequence[Arm]) -> tuple[str, Mode]:
    """The name of the metric and its direction: what the study says, or else the task's monitor in the test.

    Raises: ExperimentError where neither says it.
    """
    metric = study.metric or Metric(f"test/{arms[0].monitor.name}", None)
    name = metric.name.partition("/")[2]
    monitors = {arm.monitor for arm in arms}
    if metric.mode is not None:
        return metric.name, metric.mode
    if len(monitors) > 1 or name != arms[0].monitor.name:
        raise ExperimentError(
            f"study: metric: whether a low {metric.name} is good is not known from the monitors of the arms "
            f"({', '.join(sorted(monitor.name for monitor in monitors))}). Say it: metric: {{name: NAME, mode: min}}."
        )
    return metric.name, arms[0].monitor.mode


def scores(result: dict[str, Any] | None, metric: str) -> dict[float | None, float]:
    """The run's values of the metric: by the numbers that its * stands for; one, by None, where it has none."""
    logged = {} if result is None else result["metrics"]
    before, star, after = metric.partition("*")
    if not star:
        return {None: logged[metric]} if metric in logged else {}
    names = [name for name in logged if name.startswith(before) and name.endswith(after)]
    by_number = {name[len(before) : len(name) - len(after)]: logged[name] for name in names}
    return {float(number): value for number, value in by_number.items() if is_digits(number)}


def outcomes(runs: Sequence[Run], metric: str) -> list[Outcome]:
    """What came of the runs. Raises ExperimentError for a metric that no finished run has logged."""
    results = [run.result for run in runs]
    numbers = sorted({at for result in results for at in scores(result, metric) if at is not None}) or [None]
    of_runs = [_outcome(run, result, metric, at) for run, result in zip(runs, results, strict=True) for at in numbers]
    states = [outcome.state for outcome in of_runs]
    if State.WITHOUT in states and State.FINISHED not in states:
        raise ExperimentError(f"study: {of_runs[states.index(State.WITHOUT)].note}")
    return of_runs


def _outcome(run: Run, result: dict[str, Any] | None, metric: str, at: float | None) -> Outcome:
    if result is None:
        state = State.UNFINISHED if run.log.exists() else State.MISSING
        return Outcome(run, state, None, None, last_words(run), at)
    value, diverged = scores(result, metric).get(at), result["diverged_at"]
    if diverged is not None or (value is not None and not math.isfinite(value)):
        note = (
            "its score is no finite number" if diverged is None else f"its loss is no finite number at step {diverged}"
        )
        return Outcome(run, State.DIVERGED, value, result, note, at)
    if value is None:
        return Outcome(run, State.WITHOUT, None, result, without_message(run, metric, result["metrics"]), at)
    return Outcome(run, State.FINISHED, value, result, "", at)


def without_message(
    run: Run,
    metric: str,
    logged: Iterable[str],
) -> str:
    """That a run has not logged the metric, and what it has."""
    return f"metric: '{metric}' was not logged by {run.label}{choices_message(metric, logged)}"


def last_words(run: Run, lines: int = 1) -> str:
    """The last lines of a run's log."""
    try:
        text = run.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def compared(
    study: Study,
    arms: Sequence[Arm],
    of_runs: Sequence[Outcome],
) -> list[Row]:
    """The rows, in the order of the arms. Runs that are not finished with a score are in no number but x."""
    by_row: dict[tuple[str, float | None], list[Outcome]] = {}
    for outcome in of_runs:
        by_row.setdefault((outcome.run.arm.key, outcome.at), []).append(outcome)
    numbers = sorted({at for _, at in by_row if at is not None}) or [None]
    firsts: dict[tuple[str, float | None], dict[int, float]] = {}  # the first arm's values by seed
    rows = []
    for arm in arms:
        for at in numbers:
            of_row = by_row.get((arm.key, at), [])
            finished = [outcome for outcome in of_row if outcome.state is State.FINISHED]
            values = {of.run.seed: of.value for of in finished if of.value is not None}
            results = [outcome.result for outcome in of_row if outcome.result is not None]
            times = [of.result["seconds_per_step"] for of in finished if of.result is not None]
            times = [seconds for seconds in times if seconds is not None]
            parameters = results[0]["parameters"] if results else None
            x = _x(study, arm, at, parameters)
            place = arm.panel, x
            is_first = arm.name == arms[0].name
            if is_first:
                firsts[place] = values
            first = firsts.get(place)
            rows.append(
                Row(
                    arm,
                    x=x,
                    values=list(values.values()),
                    are_all=bool(finished) and len(finished) == len(of_row),
                    mean=estimate_of(list(values.values())),
                    difference=None if is_first or first is None else difference(first, values),
                    seeds_of_first=len(first or {}),
                    parameters=parameters,
                    step_ms=1e3 * median(times) if times else None,
                    published=study.published.get(arm.name),
                )
            )
    return rows


def _x(study: Study, arm: Arm, at: float | None, parameters: int | None) -> float | None:
    if study.x is None or at is not None:
        return at
    return parameters if study.x == PARAMETERS or not isinstance(arm.level, int | float) else arm.level
