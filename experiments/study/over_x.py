"""A study's metric over x: the curves with their intervals, and the smallest x that reached the goal."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.core.curves import as_label
from experiments.study.definition import Mode, Study
from experiments.study.outcomes import Row, State, compared, outcomes
from experiments.study.plots import new_figure, save
from experiments.study.runs import Run
from experiments.study.tables import csv_text


def up_to_goal(study: Study, runs: Sequence[Run], chosen: tuple[str, Mode]) -> list[Run]:
    """The runs that the goal asks for: of each curve, up to the first level that reached it or is not finished."""
    if study.goal is None:
        return list(runs)
    asked: list[Run] = []
    ended = set()  # curves
    for arm in {run.arm.key: run.arm for run in runs}.values():
        if (arm.panel, arm.name) in ended:
            continue
        of_arm = [run for run in runs if run.arm.key == arm.key]
        asked += of_arm
        of_runs = outcomes(of_arm, chosen[0])
        is_through = all(of.state in (State.FINISHED, State.DIVERGED) for of in of_runs)
        if not is_through or _is_reached(study, compared(study, [arm], of_runs)[0], chosen[1]):
            ended.add((arm.panel, arm.name))
    return asked


def goal_csv(study: Study, rows: Sequence[Row], mode: Mode) -> str:
    """The smallest x whose mean over the seeds is as good as the goal, by panel and arm; none where there is none.

    `first_seed` and `last_seed` are the smallest x at which one seed is there, and all of them. An axis is left where
    the mean is there, so that `last_seed` may be blank because no larger value was tried: see `largest_tried`.
    """
    lines = []
    for panel, arm, of_curve in _curves(study, rows):
        good = [(row, [_is_as_good(study, value, mode) for value in row.values]) for row in of_curve]
        found = {
            study.x: [row for row in of_curve if _is_reached(study, row, mode)],
            "first_seed": [row for row, of_seeds in good if any(of_seeds)],
            "last_seed": [row for row, of_seeds in good if row.are_all and all(of_seeds)],
            "largest_tried": of_curve[-1:],
        }
        smallest = {name: f"{of[0].x:g}" if of else "" for name, of in found.items()}
        lines.append({study.panel or "panel": panel, "arm": arm, **smallest})
    return csv_text(list(lines[0]) if lines else [], lines)


def draw_over_x(study: Study, rows: Sequence[Row], metric: str, mode: Mode, stem: Path) -> None:
    """Draw means, seeds and intervals, a panel for each panel, and with a goal one more of what reached it.

    Raises: ExperimentError where the files cannot be written.
    """
    # The frame is that of the seeds' values: an interval of few seeds may be far wider, or go below 0 on a logarithm.
    values = [value for row in rows for value in row.values] or [math.nan]
    is_wide = min(values) > 0 and max(values) > 10 * min(values)
    if is_wide:  # then the axis is logarithmic
        factor = (max(values) / min(values)) ** 0.05
        lowest, highest = min(values) / factor, max(values) * factor
    else:
        margin = 0.05 * (max(values) - min(values))
        lowest, highest = min(values) - margin, max(values) + margin
    has_goal = study.goal is not None and len(study.panels) > 1
    count = len(study.panels) + has_goal
    figure = new_figure(figsize=(3.6 * count + 1.4, 3.6))
    all_axes = figure.subplots(1, count, squeeze=False)[0]
    colors = {arm: f"C{i % 10}" for i, arm in enumerate(study.arms)}
    by_panel = dict(zip(study.panels, all_axes, strict=False))
    for panel, arm, of_curve in _curves(study, rows):
        axes, color = by_panel[panel], colors[arm]
        points = [(row.x, row.mean) for row in of_curve if row.mean is not None]
        xs, means = [x for x, _ in points], [of.mean for _, of in points]
        axes.plot(xs, means, color=color, label=as_label(arm))
        seeds = [(row.x, value) for row in of_curve for value in row.values]
        axes.plot([x for x, _ in seeds], [y for _, y in seeds], linestyle="", marker=".", markersize=4, color=color)
        bands = [(of.mean, of.mean) if of.low is None or of.high is None else (of.low, of.high) for _, of in points]
        low, high = [max(low, lowest) for low, _ in bands], [high for _, high in bands]
        axes.fill_between(xs, low, high, color=color, alpha=0.15)
        if any(x > 0 for x in xs):
            axes.set_xscale("log", base=2)  # which matplotlib refuses where nothing is drawn
    for panel, axes in by_panel.items():
        axes.set(title=as_label(f"{study.panel} {panel}".strip()), xlabel=study.x, ylabel=metric.rstrip("_*"))
        if study.goal is not None:
            axes.axhline(study.goal, color="grey", linewidth=0.8)
        if is_wide:
            axes.set_yscale("log")
        if lowest < highest:  # else there is one value, and matplotlib finds a frame
            axes.set_ylim(lowest, highest)
    all_axes[0].legend(fontsize="small")
    if has_goal:
        _draw_goal(study, rows, mode, colors, all_axes[-1])
    save(figure, stem)


def _draw_goal(study: Study, rows: Sequence[Row], mode: Mode, colors: dict[str, str], axes: Any) -> None:
    """The x that reached the goal over the panels; an arrow up where the largest that was tried did not."""
    found: dict[str, dict[float, float]] = {arm: {} for arm in study.arms}
    missed: dict[str, dict[float, float]] = {arm: {} for arm in study.arms}
    for panel, arm, of_curve in _curves(study, rows):
        xs = [row.x for row in of_curve if _is_reached(study, row, mode)]
        (found if xs else missed)[arm][float(panel)] = xs[0] if xs else of_curve[-1].x
    for of_arms, style in ((found, {"marker": "o"}), (missed, {"marker": "^", "linestyle": ":"})):
        for arm, xs in of_arms.items():
            axes.plot(list(xs), list(xs.values()), color=colors[arm], **style)
    axes.set(title=f"goal {study.goal:g} (▲ not reached)", xlabel=study.panel, ylabel=study.x)
    axes.set_xscale("log", base=2)
    if any(row.x for row in rows):
        axes.set_yscale("log", base=2)


def _curves(study: Study, rows: Sequence[Row]) -> list[tuple[str, str, list[Any]]]:
    """The rows of each panel and arm whose x is known, from left to right."""
    curves = []
    for panel in study.panels:
        for arm in study.arms:
            known = [row for row in rows if (row.arm.panel, row.arm.name) == (panel, arm) and row.x is not None]
            if known:
                curves.append((panel, arm, sorted(known, key=lambda row: row.x or 0.0)))
    return curves


def _is_reached(study: Study, row: Row, mode: Mode) -> bool:
    return row.are_all and row.mean is not None and _is_as_good(study, row.mean.mean, mode)


def _is_as_good(study: Study, value: float, mode: Mode) -> bool:
    assert study.goal is not None
    return value <= study.goal if mode == "min" else value >= study.goal
