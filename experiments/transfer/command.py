"""The command `transfer`: how good sentence vectors are for other tasks."""

import csv
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, choices_message, write_text, writing
from experiments.core.intervals import estimate_of
from experiments.core.run_folder import new_folder
from experiments.transfer.encoders import Arm, arms
from experiments.transfer.evaluation import Vectors, require_scikit_learn
from experiments.transfer.tasks import TASKS, Transfer, published_sizes, read_task

_COLUMNS = ("encoder", "run_or_seed", "task", "metric", "value", "low", "high", "dimensions", "encode_s", "evaluate_s")
_LINE = "{:<6} {:<9} {:>8}  {:<22} {:>5}  {}"
Row = dict[str, Any]


def main(invocation: Invocation) -> None:
    """Print a table of each task's metrics with 95 % intervals for each encoder, and write them as CSV.

    Raises ExperimentError without scikit-learn, and for data or encoders that cannot be used, before any is evaluated.
    """
    options = _parser().parse_args(invocation.argv[1:])
    names = _chosen(options.tasks)
    if options.untrained < 0:
        raise ExperimentError(f"--untrained: got {options.untrained}, expected at least 0.")
    require_scikit_learn()
    compared = list(arms(options.encoders, options.untrained, options.device, invocation.trusted))
    tasks = {name: read_task(name, options.root, options.text or options.root / "books") for name in names}
    output = options.output or new_folder(Path("runs/transfer")) / "transfer.csv"
    _check_output(output)
    for name, task in tasks.items():
        print(_sizes_line(name, task))
    print("\n" + _LINE.format("task", "metric", "value", "95 % interval", "D", "encoder"))
    rows: list[Row] = []
    for name, task in tasks.items():
        for arm in compared:
            of_arm = _evaluated(name, task, arm)
            rows += of_arm
            _write(rows, output)
            print("\n".join(_lines(of_arm)), flush=True)
    print(
        "\nIntervals: over the ten folds, or by bootstrap over a test; of several runs or seeds, over these.\n"
        f"written: {output}"
    )


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="python -m experiments transfer", description="How good sentence vectors are for other tasks."
    )
    parser.add_argument(
        "encoders",
        nargs="+",
        metavar="ENCODER",
        help="[NAME=]RUN[,RUN...], the runs of one encoder, or [NAME=]module:function, which is imported",
    )
    parser.add_argument("--tasks", default="sick,mr,subj,bshift", help=f"of {','.join(TASKS)} (%(default)s)")
    parser.add_argument(
        "--data.root", dest="root", type=Path, required=True, metavar="FOLDER", help="below which the data are"
    )
    parser.add_argument(
        "--data.text", dest="text", type=Path, metavar="PATH", help="a text or texts for bshift (FOLDER/books)"
    )
    parser.add_argument(
        "--untrained", type=int, default=5, metavar="N", help="seeds of the networks before training, and of bags (5)"
    )
    parser.add_argument("--device", default="cpu", help="where networks run, as cuda (cpu)")
    parser.add_argument("--output", type=Path, metavar="CSV", help="(runs/transfer/version_N/transfer.csv)")
    return parser


def _chosen(given: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in TASKS:
            raise ExperimentError(f"--tasks: there is no task '{name}'{choices_message(name, TASKS)}")
    return names


def _check_output(path: Path) -> None:
    if path.exists():
        raise ExperimentError(f"--output: {path} is there already. Move it, or give another name.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def _sizes_line(name: str, task: Transfer) -> str:
    sizes, published = task.sizes, published_sizes(name)
    note = f", but {_joined(published)} are published" if published and sizes != published else ""
    return f"{name}: {_joined(sizes)} examples{note}"


def _joined(sizes: Iterable[int]) -> str:
    return " + ".join(f"{size:,}" for size in sizes)


def _evaluated(name: str, task: Transfer, arm: Arm) -> list[Row]:
    """A row for each metric of each of its encoders."""
    rows = []
    for one, make in arm.encoders.items():
        vectors = Vectors(make(), arm.name)
        begin = perf_counter()
        scores = task.scores(vectors)
        seconds = perf_counter() - begin - vectors.seconds
        of = f"{arm.name}, {one}" if len(arm.encoders) > 1 else arm.name
        print(f"{name}, {of}: encoded in {vectors.seconds:.1f} s, evaluated in {seconds:.1f} s", file=sys.stderr)
        shared = {"encoder": arm.name, "run_or_seed": one, "task": name, "dimensions": vectors.dimensions}
        shared |= {"encode_s": round(vectors.seconds, 2), "evaluate_s": round(seconds, 2)}
        rows += [shared | score._asdict() for score in scores]
    return rows


def _lines(rows: list[Row]) -> list[str]:
    """A line for each metric of one task and encoder: of several runs or seeds their mean."""
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        each = [row for row in rows if row["metric"] == metric]
        value, low, high = (each[0][name] for name in ("value", "low", "high"))
        encoder = each[0]["encoder"]
        if len(each) > 1:
            estimate = estimate_of([row["value"] for row in each])
            assert estimate is not None
            value, low, high = estimate.mean, estimate.low, estimate.high
            encoder = f"{encoder}, {len(each)}"
        digits = 1 if metric in ("accuracy", "F1") else 3
        shown, interval = f"{value:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"
        lines.append(_LINE.format(each[0]["task"], metric, shown, interval, each[0]["dimensions"], encoder))
    return lines


def _write(rows: list[Row], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
