"""What came of a study's cells, read from their files, and the rows that compare the arms."""

import math
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from statistics import median
from typing import Any, NamedTuple

from experiments.core.errors import ExperimentError, choices_message
from experiments.study.cells import Arm, Cell
from experiments.study.definition import Metric, Mode, Published, Study
from experiments.study.statistics import Difference, Estimate, difference, estimate


class State(Enum):
    """How far a cell is."""

    FINISHED = "finished"
    DIVERGED = "diverged"  # at some step its loss was no finite number: its score is of no trained network
    WITHOUT = "without the metric"
    UNFINISHED = "unfinished"
    MISSING = "missing"


class Outcome(NamedTuple):
    """What came of a cell."""

    cell: Cell
    state: State
    value: float | None  # of the metric, where it is finished or diverged after a validation
    result: dict[str, Any] | None
    note: str  # where it diverged, what it has for the metric, or the last that a run without a result said


class Row(NamedTuple):
    """An arm beside the first."""

    arm: Arm
    mean: Estimate | None  # over the finished cells
    difference: Difference | None  # None for the first arm
    parameters: int | None
    step_ms: float | None  # the median over the finished cells
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


def outcomes(cells: Sequence[Cell], metric: str) -> list[Outcome]:
    """What came of the cells. Raises ExperimentError for a metric that no finished run has logged."""
    of_cells = [_outcome(cell, metric) for cell in cells]
    states = [outcome.state for outcome in of_cells]
    if State.WITHOUT in states and State.FINISHED not in states:
        raise ExperimentError(f"study: {of_cells[states.index(State.WITHOUT)].note}")
    return of_cells


def _outcome(cell: Cell, metric: str) -> Outcome:
    result = cell.result
    if result is None:
        state = State.UNFINISHED if cell.log.exists() else State.MISSING
        return Outcome(cell, state, None, None, last_words(cell))
    value, diverged = result["metrics"].get(metric), result["diverged_at"]
    if diverged is None and value is None:
        return Outcome(cell, State.WITHOUT, None, result, without_message(cell, metric, result["metrics"]))
    if diverged is not None or not math.isfinite(value):
        note = (
            "its score is no finite number" if diverged is None else f"its loss is no finite number at step {diverged}"
        )
        return Outcome(cell, State.DIVERGED, value, result, note)
    return Outcome(cell, State.FINISHED, value, result, "")


def without_message(
    cell: Cell,
    metric: str,
    logged: Iterable[str],
) -> str:
    """That a run has not logged the metric, and what it has."""
    return f"metric: '{metric}' was not logged by {cell.label}{choices_message(metric, logged)}"


def last_words(cell: Cell, lines: int = 1) -> str:
    """The last lines of a run's log."""
    try:
        text = cell.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def compared(
    arms: Sequence[Arm],
    of_cells: Sequence[Outcome],
    study: Study,
) -> Iterator[Row]:
    """A row for each arm, in their order. Cells that are not finished with a score are in no number."""
    values: dict[str, dict[int, float]] = {arm.key: {} for arm in arms}
    results: dict[str, list[dict[str, Any]]] = {arm.key: [] for arm in arms}
    for outcome in of_cells:
        if outcome.state is State.FINISHED:
            assert outcome.value is not None
            assert outcome.result is not None
            values[outcome.cell.arm.key][outcome.cell.seed] = outcome.value
            results[outcome.cell.arm.key].append(outcome.result)
    for arm in arms:
        of_arm = results[arm.key]
        times = [result["seconds_per_step"] for result in of_arm if result["seconds_per_step"] is not None]
        yield Row(
            arm,
            estimate(list(values[arm.key].values())),
            None if arm is arms[0] else difference(values[arms[0].key], values[arm.key]),
            of_arm[0]["parameters"] if of_arm else None,
            1e3 * median(times) if times else None,
            study.published.get(arm.name),
        )
