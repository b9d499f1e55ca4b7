"""The commands `study` and `report`."""

import os
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from experiments.core.command_line import Invocation
from experiments.core.errors import ExperimentError
from experiments.core.parsing import OptionParser
from experiments.study.board import Board
from experiments.study.cells import Arm, Cell, resolved, write_config
from experiments.study.definition import Study, read_study
from experiments.study.jobs import Job, Process, Running, run_all
from experiments.study.lock import locked
from experiments.study.outcomes import chosen_metric, outcomes
from experiments.study.report import write_report


def main(invocation: Invocation) -> None:
    """Run a study and write its report, or write the report alone.

    Exits with 1 where a cell failed. Raises ExperimentError for a mistake in the study, before anything runs.
    """
    name, *argv = invocation.argv
    options = _parser(name).parse_args(argv)
    _check(options)
    study = read_study(options.study)
    folder = options.output or Path("runs/studies") / study.path.stem
    arms = resolved(study, options.set, invocation.trusted)
    cells = [Cell(arm, seed, folder) for arm in arms for seed in study.seeds]
    metric, mode = chosen_metric(study, arms)
    board = None
    if name == "study":
        _warn_of_the_clock(arms)
        outcomes(cells, metric)  # one that a finished cell did not log is a mistake now
        with locked(folder) as lock, _terminable():
            board = _run(study, arms, cells, metric, options, invocation.trusted, lock)
    if board is None or any(cell.result is not None for cell in cells):
        command = ["study", str(options.study), *(word for change in options.set for word in ("--set", change))]
        command += ["--output", str(folder)] if options.output else []
        table = write_report(study, arms, cells, (metric, mode), folder, command)
        print(f"\n{table}\n\nwritten: {folder / 'report.html'}")
    if board is not None and board.failed:
        print(f"\n{board.errors()}", file=sys.stderr)
        raise SystemExit(1)


def _parser(name: str) -> OptionParser:
    what = {"study": "Run what is missing of a study, and report.", "report": "The report of a study, from its files."}
    parser = OptionParser(prog=f"python -m experiments {name}", description=what[name])
    parser.add_argument("study", type=Path, metavar="STUDY", help="the YAML file that defines the study")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all arms (repeatable)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for its files (runs/studies/NAME)")
    if name == "study":
        parser.add_argument("--jobs", type=int, metavar="J", help="runs beside each other (1)")
        parser.add_argument(
            "--cluster", nargs="?", const="local", metavar="ADDRESS", help="run on Ray: here, or at an address"
        )
    return parser


def _check(options: Namespace) -> None:
    jobs = getattr(options, "jobs", None)
    if jobs is not None and jobs < 1:
        raise ExperimentError(f"study: --jobs {jobs}: expected at least 1.")
    if jobs is not None and options.cluster:
        raise ExperimentError("study: --jobs is of one machine; on a cluster the YAML says what a run takes (cluster).")


def _warn_of_the_clock(arms: Sequence[Arm]) -> None:
    clocked = [arm.name for arm in arms if arm.settings["trainer"]["max_time"]]
    if clocked:
        warnings.warn(
            f"{', '.join(clocked)}: trainer.max_time ends a run by the clock, so its result depends on what else the "
            "machine does. Set trainer.max_time to null, and trainer.max_steps.",
            stacklevel=2,
        )


def _run(
    study: Study,
    arms: Sequence[Arm],
    cells: Sequence[Cell],
    metric: str,
    options: Namespace,
    trusted: Sequence[str],
    lock: IO[str],
) -> Board:
    """Run the cells that are not finished."""
    missing = [cell for cell in cells if cell.result is None]
    at_once = options.jobs or 1
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    start: Callable[[Job], Running] = partial(Process, lock=lock)
    if options.cluster and missing:
        from experiments.study.cluster import connect  # Ray is an extra

        start, at_once = connect(options.cluster, study.cluster, len(missing))
        threads = int(study.cluster.cpus)
    for cell in missing:
        write_config(cell)
    trust = [word for module in trusted for word in ("--trust", module)]
    jobs = [Job(cell, [*_threads(cell, threads), *trust]) for cell in missing]
    print(
        f"{len(cells)} cells: {len(cells) - len(missing)} finished, {len(missing)} to run, {at_once} at once, "
        f"{threads} threads each where the config does not say.",
        flush=True,
    )
    with Board(arms, cells, missing, metric, at_once) as board:
        run_all(jobs, start, at_once, board)
    return board


def _threads(cell: Cell, threads: int) -> list[str]:
    return [] if cell.arm.settings["threads"] else [f"--threads={threads}"]


@contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM stop the study as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only there handlers can be set
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
