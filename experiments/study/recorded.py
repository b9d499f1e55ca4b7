"""Pictures of what the runs of a study recorded beside its metric: other logged values, and histograms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.core.errors import ExperimentError, choices_message, writing
from experiments.core.run_folder import Histogram, read_histograms, read_metrics
from experiments.study.outcomes import Outcome, Row, State
from experiments.study.plots import as_label, curve, draw_band, new_figure, save

_ACROSS = 3  # panels beside each other
Panel = dict[str, list[Any]]  # what each arm's runs have, by the arm's key


def draw_recorded(
    names: Sequence[str],
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    stem: Path,
) -> list[str]:
    """Draw what is named, a panel for each, to `STEM.png` and `STEM.svg`; of nothing there is no picture.

    A logged name, as val/saturated, is drawn over the steps like a learning curve. Another name is that of a file of
    histograms in the runs' folders, as activations for activations.csv: drawn is the last that each run wrote, as the
    share of each bin, and where a run has histograms of several things, a panel for each of them.
    Returns what could not be drawn and why: names of which no finished run has anything, and damaged files.
    Raises: ExperimentError where the pictures cannot be written.
    """
    finished = [outcome for outcome in outcomes if outcome.state is State.FINISHED]
    panels: dict[str, Panel] = {}  # by title
    not_drawn = []
    for name in names if finished else ():
        try:
            panels |= _panels(name, finished)
        except ExperimentError as error:
            not_drawn.append(f"Not drawn: {error}")
    if not panels:
        for suffix in (".png", ".svg"):
            with writing(stem):
                stem.with_suffix(suffix).unlink(missing_ok=True)  # of a report before
        return not_drawn
    across = min(len(panels), _ACROSS)
    down = -(-len(panels) // across)
    figure = new_figure(figsize=(5.5 * across, 4.5 * down))
    shown = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (title, by_arm) in zip(shown, panels.items(), strict=False):
        axes.set(title=as_label(title))
        for i, row in enumerate(rows):
            if of_arm := by_arm.get(row.arm.key):
                draw = _draw_shares if isinstance(of_arm[0], Histogram) else draw_band
                draw(axes, of_arm, f"{row.arm.name} ({len(of_arm)})", {"color": f"C{i % 10}"})
        axes.set(xlabel="step" if "/" in title else "value", ylabel="" if "/" in title else "share of each bin")
        axes.legend()
    for axes in shown[len(panels) :]:
        axes.set_axis_off()
    save(figure, stem)
    return not_drawn


def _panels(name: str, finished: Sequence[Outcome]) -> dict[str, Panel]:
    """The panels of a name, by title. Raises ExperimentError where there is none, or none can be drawn."""
    panels: dict[str, Panel] = {}
    for outcome in finished:
        for title, what in _recorded(outcome, name).items():
            panels.setdefault(title, {}).setdefault(outcome.run.arm.key, []).append(what)
    if not panels:
        raise ExperimentError(f"no run has recorded '{name}'{choices_message(name, _known(finished))}")
    for title, by_arm in panels.items():
        for of_arm in by_arm.values():
            if isinstance(of_arm[0], Histogram) and any(of.edges != of_arm[0].edges for of in of_arm):
                raise ExperimentError(f"the histograms {title} of an arm have different bins, expected equal ones.")
    return panels


def _recorded(outcome: Outcome, name: str) -> dict[str, Any]:
    """What a run has of a name, by the panel that it belongs to."""
    if "/" in name:
        of_run = curve(outcome, name)
        return {name: of_run} if of_run else {}
    last = {histogram.of: histogram for histogram in read_histograms(outcome.run.folder.path / f"{name}.csv")}
    return {f"{name}: {of}" if of else name: histogram for of, histogram in last.items()}


def _known(finished: Sequence[Outcome]) -> dict[str, None]:
    """The names that can be drawn."""
    known: dict[str, None] = {}
    for outcome in finished:
        known |= dict.fromkeys(key for row in read_metrics(outcome.run.folder.metrics) for key in row if "/" in key)
        files = [path for path in sorted(outcome.run.folder.path.glob("*.csv")) if path.name != "metrics.csv"]
        known |= dict.fromkeys(path.stem for path in files)
    return known


def _draw_shares(axes: Any, histograms: list[Histogram], label: str, style: dict[str, Any]) -> None:
    """The mean share of each bin, with the range over the runs as a band."""
    edges = list(histograms[0].edges)
    shares = [[count / max(1, sum(histogram.counts)) for count in histogram.counts] for histogram in histograms]
    of_bins = list(zip(*shares, strict=True))
    axes.stairs([sum(of_bin) / len(of_bin) for of_bin in of_bins], edges, **style, label=as_label(label))
    lowest, highest = [min(of_bin) for of_bin in of_bins], [max(of_bin) for of_bin in of_bins]
    axes.stairs(highest, edges, baseline=lowest, fill=True, alpha=0.2, **style)
