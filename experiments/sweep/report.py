"""What came of a sweep: the means with intervals, the sizes that reached the goal, and the curves."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from experiments.core.errors import write_figure
from experiments.study.statistics import estimate
from experiments.sweep.definition import Sweep

Row = dict[str, Any]


class Point(NamedTuple):
    """A point of a curve: the mean over seeds, with the half width of its 95 % t-interval."""

    x: float
    mean: float  # NaN where a run diverged
    half_width: float  # NaN for one seed
    values: list[float]


def curve(rows: Sequence[Row], panel: str, arm: str) -> list[Point]:
    """The points of a curve, from left to right: one for each size, or more where a run gives several.

    Sizes with the same x stay apart. A run that diverged and so has no x counts at every x of its size.
    """
    of_curve = [row for row in rows if row["panel"] == panel and row["arm"] == arm]
    points = []
    for size in dict.fromkeys(row["size"] for row in of_curve):
        of_size = [row for row in of_curve if row["size"] == size]
        lost = [row["value"] for row in of_size if math.isnan(row["x"])]
        for x in dict.fromkeys(row["x"] for row in of_size if not math.isnan(row["x"])) or [math.nan]:
            values = [row["value"] for row in of_size if row["x"] == x] + lost
            points.append(Point(x, mean(values), half_width(values), values))
    return sorted(points, key=lambda point: (math.isnan(point.x), point.x))


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % t-interval of the mean; NaN for one value."""
    of_values = estimate(values)
    return math.nan if of_values is None or of_values.high is None else of_values.high - of_values.mean


def table(rows: Sequence[Row]) -> str:
    """The curves as CSV. `lowest` and `highest` are of the runs that did not diverge."""
    lines = []
    for panel, arm in dict.fromkeys((row["panel"], row["arm"]) for row in rows):
        for point in curve(rows, panel, arm):
            finite = [value for value in point.values if math.isfinite(value)] or [math.nan]
            numbers = (f"{number:.4g}" for number in (point.mean, point.half_width, min(finite), max(finite)))
            lines.append((panel, arm, f"{point.x:g}", len(point.values), *numbers))
    return _csv(("panel", "arm", "x", "seeds", "mean", "half_width", "lowest", "highest"), lines)


def reached(sweep: Sweep, rows: Sequence[Row]) -> str:
    """The smallest x whose mean over the seeds is at most the goal, by panel and arm, as CSV; none where there is none.

    `first_seed` and `last_seed` are the smallest x at which one seed is there, and all of them. A sweep is left where
    the mean is there, so that `last_seed` may be blank because no larger size was tried: see `largest_tried`.
    """
    goal = sweep.goal
    assert goal is not None
    lines = []
    for panel in sweep.panels:
        for arm in sweep.arms:
            points = curve(rows, panel, arm)
            found = (
                [p.x for p in points if p.mean <= goal],
                [p.x for p in points if any(value <= goal for value in p.values)],
                [p.x for p in points if all(value <= goal for value in p.values)],
            )
            lines.append((panel, arm, *(f"{min(xs):g}" if xs else "" for xs in found), f"{points[-1].x:g}"))
    return _csv((sweep.panel, "arm", f"{sweep.x}", "first_seed", "last_seed", "largest_tried"), lines)


def draw(sweep: Sweep, rows: Sequence[Row], output: Path) -> None:
    """Draw means, seeds and intervals, a panel for each panel, and with a goal one more of what reached it."""
    # Imported here because it takes a second, which a mistake need not wait for.
    from matplotlib.figure import Figure

    # The frame is that of the seeds' values: an interval of few seeds may be far wider, or go below 0 on a logarithm.
    values = [row["value"] for row in rows if math.isfinite(row["value"])] or [math.nan]
    is_wide = min(values) > 0 and max(values) > 10 * min(values)
    if is_wide:  # then the axis is logarithmic
        factor = (max(values) / min(values)) ** 0.05
        lowest, highest = min(values) / factor, max(values) * factor
    else:
        margin = 0.05 * (max(values) - min(values))
        lowest, highest = min(values) - margin, max(values) + margin
    panels = [*sweep.panels, *(["goal"] if sweep.goal is not None else [])]
    figure = Figure(figsize=(3.6 * len(panels) + 1.4, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, sweep.panels, strict=False):
        for color, arm in enumerate(sweep.arms):
            points = curve(rows, panel, arm)
            xs, means = [p.x for p in points], [p.mean for p in points]
            axes.plot(xs, means, color=f"C{color}", label=arm)
            seeds = [(p.x, value) for p in points for value in p.values]
            axes.plot(*zip(*seeds, strict=True), linestyle="", marker=".", markersize=4, color=f"C{color}")
            low = [max(p.mean - p.half_width, lowest) for p in points]
            axes.fill_between(xs, low, [p.mean + p.half_width for p in points], color=f"C{color}", alpha=0.15)
        axes.set(title=f"{sweep.panel} {panel}".strip(), xlabel=sweep.x, ylabel=sweep.metric.rstrip("_*"))
        if any(row["x"] > 0 and math.isfinite(row["value"]) for row in rows if row["panel"] == panel):
            axes.set_xscale("log", base=2)  # which matplotlib refuses where nothing is drawn
        if sweep.goal is not None:
            axes.axhline(sweep.goal, color="grey", linewidth=0.8)
        if is_wide:
            axes.set_yscale("log")
        if lowest < highest:  # else there is one value, and matplotlib finds a frame
            axes.set_ylim(lowest, highest)
    all_axes[0].legend(fontsize="small")
    if sweep.goal is not None:
        _draw_goal(sweep, rows, all_axes[-1])
    write_figure(output, figure, dpi=100)


def _draw_goal(sweep: Sweep, rows: Sequence[Row], axes: Any) -> None:
    """The sizes that reached the goal over the panels; an arrow up where the largest that was tried did not."""
    for color, arm in enumerate(sweep.arms):
        found, missed = {}, {}
        for panel in sweep.panels:
            points = curve(rows, panel, arm)
            xs = [p.x for p in points if p.mean <= sweep.goal]  # type: ignore[operator]
            (found if xs else missed)[float(panel)] = min(xs) if xs else points[-1].x
        axes.plot(list(found), list(found.values()), marker="o", color=f"C{color}")
        axes.plot(list(missed), list(missed.values()), marker="^", linestyle=":", color=f"C{color}")
    axes.set(title=f"goal {sweep.goal:g} (▲ not reached)", xlabel=sweep.panel, ylabel=sweep.x)
    axes.set_xscale("log", base=2)
    if any(row["x"] > 0 for row in rows):
        axes.set_yscale("log", base=2)


def _csv(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *lines])
    return text.getvalue()
