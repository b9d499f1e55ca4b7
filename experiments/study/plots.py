"""The pictures of a study: learning curves with bands, and a dot for each seed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.core.curves import as_label
from experiments.core.errors import write_figure
from experiments.core.run_folder import read_metrics
from experiments.study.outcomes import Outcome, Row, State

_STAGES = ("train", "val")
Curve = dict[int, float]  # values by step


def draw_curves(
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    metric: str,
    stem: Path,
) -> None:
    """Draw the metric over the steps in training and validation, to `STEM.png` and `STEM.svg`.

    A line is the mean of an arm's finished runs, where all of them have a value; its band reaches from the lowest to
    the highest of them. A run that diverged is a dotted line of its own.
    Raises: ExperimentError where the files cannot be written.
    """
    name = metric.partition("/")[2]
    read = {outcome.run.id: {stage: curve(outcome, f"{stage}/{name}") for stage in _STAGES} for outcome in outcomes}
    panels = [stage for stage in _STAGES if any(stages[stage] for stages in read.values())] or ["val"]
    figure = new_figure(figsize=(5.5 * len(panels), 4.5))
    for axes, stage in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(title=f"{stage}/{name}", xlabel="step")
        for i, row in enumerate(rows):
            of_arm = [outcome for outcome in outcomes if outcome.run.arm is row.arm]
            curves = [read[outcome.run.id][stage] for outcome in of_arm if outcome.state is State.FINISHED]
            style: dict[str, Any] = {"color": f"C{i % 10}"}
            draw_band(axes, curves, f"{row.arm.name} ({len(curves)})", style)
            for outcome in of_arm:
                if outcome.state is State.DIVERGED:
                    of_run = read[outcome.run.id][stage]
                    label = as_label(f"{outcome.run.label}: diverged")
                    axes.plot(list(of_run), list(of_run.values()), ":", **style, label=label)
        axes.legend()
    save(figure, stem)


def draw_dots(
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    metric: str,
    stem: Path,
) -> None:
    """Draw each seed's value by arm, with the mean and its interval beside them, to `STEM.png` and `STEM.svg`.

    Thin lines join equal seeds. A run that diverged is a cross above its arm.
    Raises: ExperimentError where the files cannot be written.
    """
    figure = new_figure(figsize=(max(4.5, 1.4 * len(rows) + 1.5), 4.5))
    axes = figure.add_subplot()
    place = {row.arm.key: i for i, row in enumerate(rows)}
    by_seed: dict[int, list[tuple[int, float]]] = {}
    for outcome in outcomes:
        if outcome.state is State.FINISHED:
            assert outcome.value is not None
            by_seed.setdefault(outcome.run.seed, []).append((place[outcome.run.arm.key], outcome.value))
    for seed, points in by_seed.items():
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, "-", color="0.8", linewidth=0.8, zorder=1)
        axes.scatter(xs, ys, s=18, color="0.35", zorder=2, gid=f"seed-{seed}")
    for i, row in enumerate(rows):
        if row.mean is not None:
            spread = row.mean.half_width or None
            axes.errorbar(i + 0.18, row.mean.mean, yerr=spread, fmt="o", capsize=4, color=f"C{i % 10}")
        if row.published is not None:
            axes.plot(i - 0.18, row.published.value, "D", color="black", markerfacecolor="none")
    for outcome in outcomes:
        if outcome.state is State.DIVERGED:
            top = axes.get_xaxis_transform()
            axes.plot(place[outcome.run.arm.key], 0.97, "x", color="C3", transform=top, clip_on=False)
    axes.set_xticks(range(len(rows)), [as_label(row.arm.name) for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set(ylabel=metric)
    save(figure, stem)


def draw_band(axes: Any, curves: list[Curve], label: str, style: dict[str, Any]) -> None:
    """A line of the curves' mean where all have a value, with their range as a band."""
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    points = [[curve[step] for curve in curves] for step in steps]
    axes.plot(steps, [math.fsum(at) / len(at) for at in points], **style, label=as_label(label))
    axes.fill_between(steps, [min(at) for at in points], [max(at) for at in points], alpha=0.2, **style)


def curve(outcome: Outcome, name: str) -> Curve:
    """The finite values that a run logged by this name."""
    values = ((int(row["step"]), float(row[name])) for row in read_metrics(outcome.run.folder.metrics) if name in row)
    return {step: value for step, value in values if math.isfinite(value)}


def new_figure(figsize: tuple[float, float]) -> Any:
    """An empty figure of so many inches."""
    # Imported here because it takes a second, which a study that only begins need not wait for.
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def save(figure: Any, stem: Path) -> None:
    """Write both files; the same picture gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": stem.name}):
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            write_figure(stem.with_suffix(suffix), figure, dpi=150, metadata=metadata)
