"""The command `sweep`: run what is missing of a sweep, in this process, and draw it."""

import contextlib
import csv
import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.core.checkpoints import load_task
from experiments.core.command_line import Invocation
from experiments.core.errors import ExperimentError, write_text, writing
from experiments.core.metrics_file import read_metrics
from experiments.core.parsing import OptionParser
from experiments.core.training import main as fit
from experiments.sweep.definition import Cell, Sweep, cells, read_sweep
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
    """All rows of the sweep, those on file first."""
    known: dict[str, list[Row]] = {}
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                known.setdefault(row["key"], []).append(_typed(row))
    rows: list[Row] = []
    for panel in sweep.panels:
        for arm in sweep.arms:
            for point in cells(sweep, panel, arm):
                of_point: list[Row] = []
                for cell in point:
                    if cell.key not in known:
                        known[cell.key] = _run(sweep, cell, trusted)
                        _write(file, [row for of_cell in known.values() for row in of_cell])
                    of_point += known[cell.key]
                rows += of_point
                if sweep.goal is not None and sum(row["value"] for row in of_point) <= sweep.goal * len(of_point):
                    break
    _write(file, rows)
    return rows


def _run(sweep: Sweep, cell: Cell, trusted: list[str]) -> list[Row]:
    """The rows of one run: one, or one for each number that the * of the metric stands for."""
    name = ", ".join(str(part) for part in (cell.panel, cell.arm, cell.size) if part not in ("", None))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        own = (f"--seed_everything={cell.seed}", f"--trainer.default_root_dir={folder}", "--name=cell")
        argv = ["fit", "--config", str(sweep.base), *cell.options, *own, *_QUIET]
        with contextlib.redirect_stdout(io.StringIO()):
            fit(Invocation(argv, trusted))
        run = Path(folder) / "cell/version_0"
        logged = {key: float(value) for row in read_metrics(run / "metrics.csv") for key, value in row.items()}
        parameters = sum(p.numel() for p in load_task(run / "checkpoints/best.ckpt").parameters())
    before, star, after = sweep.metric.partition("*")
    points = {
        metric[len(before) : len(metric) - len(after)]: value
        for metric, value in logged.items()
        if (metric.startswith(before) and metric.endswith(after) if star else metric == sweep.metric)
    }
    if not points:
        raise ExperimentError(f"sweep: {name}: nothing was logged as {sweep.metric}, but {', '.join(logged)}.")
    seconds = round(time.perf_counter() - begun, 1)
    print(
        f"{name}, seed {cell.seed}: {parameters:,} parameters, {points if star else logged[sweep.metric]}", flush=True
    )
    common = {**cell._asdict(), "parameters": parameters, "seconds": seconds}
    xs = {"": parameters if sweep.x == "parameters" else cell.size}
    return [_typed({**common, "x": xs.get(at, at), "value": value}) for at, value in points.items()]


def _typed(row: dict[str, Any]) -> Row:
    numbers = {"seed": int, "x": float, "value": float, "parameters": int, "seconds": float}
    return {column: numbers.get(column, str)(row[column]) for column in COLUMNS}


def _write(file: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator=os.linesep)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())
