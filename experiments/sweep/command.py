"""The command `sweep`: run what is missing of a sweep, in this process, and draw it."""

import contextlib
import csv
import io
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.core.command_line import Invocation
from experiments.core.errors import DivergedError, ExperimentError, write_text, writing
from experiments.core.metrics_file import read_metrics
from experiments.core.parsing import OptionParser
from experiments.core.result_file import read_result
from experiments.core.training import main as fit
from experiments.sweep.definition import Cell, Sweep, cells, is_number, read_sweep
from experiments.sweep.report import Row, draw, reached, table

COLUMNS = ("panel", "arm", "size", "seed", "x", "value", "parameters", "seconds", "key")
_QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def main(invocation: Invocation) -> None:
    """Run the cells that `runs.csv` lacks, one after the other, add each to it, and draw the curves.

    A run is a `fit` whose folder is thrown away: its row is what is kept. Rows of settings that are no longer asked for
    are dropped.
    Raises ExperimentError for a file that defines no sweep, and where a run has a mistake.
    """
    parser = OptionParser(prog="python -m experiments sweep", description="Curves over a size, of many short runs.")
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="a YAML file, as those in experiments/sweeps")
    parser.add_argument("--out", type=Path, default=None, help="the folder of the results (runs/sweeps/NAME)")
    options = parser.parse_args(invocation.argv[1:])
    out = options.out or Path("runs/sweeps") / options.sweep.stem
    sweep = read_sweep(options.sweep)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    rows = _complete(sweep, out / "runs.csv", invocation.trusted)
    write_text(out / "curves.csv", table(rows))
    draw(sweep, rows, out / "curves.png")
    print(table(rows))
    if sweep.goal is not None:
        write_text(out / "reached.csv", reached(sweep, rows))
        print(reached(sweep, rows))
    print(f"written: {out}")


def _complete(sweep: Sweep, file: Path, trusted: list[str]) -> list[Row]:
    """All rows of the sweep, each run once: those on file, or of another arm with the same settings, are taken over."""
    known: dict[str, dict[str, Row]] = {}  # by key and x
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                known.setdefault(row["key"], {})[row["x"]] = _typed(row)
    rows: list[Row] = []
    for panel in sweep.panels:
        for arm in sweep.arms:
            for point in cells(sweep, panel, arm):
                of_point: list[Row] = []
                for cell in point:
                    if cell.key not in known:
                        known[cell.key] = {str(row["x"]): row for row in _run(sweep, cell, trusted)}
                        _write(file, [row for of_cell in known.values() for row in of_cell.values()])
                    # The key knows no names: these may have changed.
                    names = {"panel": cell.panel, "arm": cell.arm}
                    of_point += [row | names for row in known[cell.key].values()]
                rows += of_point
                if sweep.goal is not None and sum(row["value"] for row in of_point) <= sweep.goal * len(of_point):
                    break
    _write(file, rows)
    return rows


def _run(sweep: Sweep, cell: Cell, trusted: list[str]) -> list[Row]:
    """The rows of one run: one, or one for each number that the * of the metric stands for.

    A run that diverged may have no test. Then the value is NaN, and so is the x of a *.
    """
    name = ", ".join(str(part) for part in (cell.panel, cell.arm, cell.size) if part not in ("", None))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        own = (f"--seed_everything={cell.seed}", f"--trainer.default_root_dir={folder}", "--name=cell")
        argv = ["fit", "--config", str(sweep.base), *cell.options, *own, *_QUIET]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(DivergedError):
            fit(Invocation(argv, trusted))
        run = Path(folder) / "cell/version_0"
        logged = {key: float(value) for row in read_metrics(run / "metrics.csv") for key, value in row.items()}
        result = read_result(run / "result.yaml")
    assert result is not None
    points = _points(sweep.metric, logged)
    if not points and (result["diverged_at"] is not None or not all(map(math.isfinite, logged.values()))):
        points = {"nan" if "*" in sweep.metric else "": math.nan}
    if not points:
        raise ExperimentError(f"sweep: {name}: nothing was logged as {sweep.metric}, but {', '.join(logged)}.")
    seconds, parameters = round(time.perf_counter() - begun, 1), result["parameters"]
    print(f"{name}, seed {cell.seed}: {parameters:,} parameters, {points.get('', points)}", flush=True)
    common = {**cell._asdict(), "parameters": parameters, "seconds": seconds}
    x = parameters if sweep.x == "parameters" else cell.size
    return [_typed({**common, "x": at or x, "value": value}) for at, value in points.items()]


def _points(metric: str, logged: dict[str, float]) -> dict[str, float]:
    """What was logged as the metric, by the numbers that its * stands for; by "" where it has none."""
    before, star, after = metric.partition("*")
    if not star:
        return {"": logged[metric]} if metric in logged else {}
    found = [name for name in logged if name.startswith(before) and name.endswith(after)]
    by_place = {name[len(before) : len(name) - len(after)]: logged[name] for name in found}
    return {at: value for at, value in by_place.items() if is_number(at)}


def _typed(row: dict[str, Any]) -> Row:
    numbers = {"seed": int, "x": float, "value": float, "parameters": int, "seconds": float}
    return {column: numbers.get(column, str)(row[column]) for column in COLUMNS}


def _write(file: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator=os.linesep)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())
