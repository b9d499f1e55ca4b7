"""Learning curves, from the metrics of one run or of several, and the command `plot`, which needs no torch."""

import csv
from collections.abc import Mapping
from pathlib import Path

from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, write_figure
from experiments.core.run_folder import read_metrics

_STYLES = {"train": {"alpha": 0.4, "linewidth": 1.0}, "val": {"marker": ".", "linewidth": 1.5}}
_ZERO_WIDTH = "\u200b"  # a space that is not seen
# Beyond it one sees nothing, and waits a minute for it.
_MOST_PANELS = 20


def main(invocation: Invocation) -> None:
    """The command `plot`: the curves of several runs in one picture.

    Raises ExperimentError for a folder that is no run's, and for an output that cannot be written.
    """
    parser = OptionParser(prog="python -m experiments plot", description="The learning curves of runs in one picture.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or its metrics.csv")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="a .png, .svg or .pdf (curves.png)")
    options = parser.parse_args(invocation.argv[1:])
    runs = {str(run): run if run.suffix == ".csv" else run / "metrics.csv" for run in options.runs}
    draw_metrics(runs, options.output)
    print(options.output)


def draw_metrics(
    runs: Mapping[str, Path],  # the metrics files by the names in the legend
    output: Path,
) -> None:
    """Draw every metric over the steps, a panel for each, training thin and validation with dots.

    Raises ExperimentError for a file without metrics, and for an output that cannot be written.
    """
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise ExperimentError(f"{output}: expected a name that ends with .png, .svg or .pdf.")
    # Imported here because it takes a second, which a command without a picture need not wait for.
    from matplotlib.figure import Figure

    curves = {name: _curves(path) for name, path in runs.items()}
    panels = sorted({metric for of_run in curves.values() for metric, _ in of_run})
    if len(panels) > _MOST_PANELS:
        raise ExperimentError(f"{output}: {len(panels)} metrics, expected at most {_MOST_PANELS}.")
    labels = {(name, stage): as_label(f"{name} {stage}") for name, run in curves.items() for _, stage in run}
    # One legend below all panels: runs' paths may be longer than a panel is wide.
    figure = Figure(figsize=(5 * len(panels), 4 + 0.25 * len(labels)), layout="constrained")
    shown = {}
    for axes, metric in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(title=metric, xlabel="step")
        for color, (name, of_run) in enumerate(curves.items()):
            for stage, style in _STYLES.items():
                if (metric, stage) in of_run:
                    steps, values = zip(*of_run[metric, stage], strict=True)
                    [line] = axes.plot(steps, values, color=f"C{color % 10}", **style)
                    shown[labels[name, stage]] = line
    figure.legend(list(shown.values()), list(shown), loc="outside lower center")
    write_figure(output, figure, dpi=150)


def as_label(text: str) -> str:
    """The text as matplotlib is to get it, to show it as it is.

    Between two `$` it reads mathematics, a line whose label begins with `_` is not in its legend, and a path may hold
    bytes that are no text.
    """
    shown = text.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")
    return f"{_ZERO_WIDTH if shown.startswith('_') else ''}{shown}"


def _curves(path: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """The points (step, value) by metric and stage."""
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    try:
        for row in read_metrics(path):
            for name, value in row.items():
                stage, _, metric = name.partition("/")
                if stage in _STYLES:
                    points.setdefault((metric, stage), []).append((int(row["step"]), float(value)))
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ExperimentError(f"{path}: no metrics file that `fit` wrote ({type(error).__name__}: {error}).") from error
    if not points:
        raise ExperimentError(f"{path}: no metrics of a training there. Give a run's folder, runs/NAME/version_N.")
    return points
