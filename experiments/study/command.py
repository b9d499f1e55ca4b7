"""The commands `study` and `report`."""

import os
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError
from experiments.study.arms import Arm, resolved
from experiments.study.board import Board
from experiments.study.definition import Study, read_study
from experiments.study.jobs import Job, Process, Running, run_all
from experiments.study.lock import locked
from experiments.study.outcomes import chosen_metric, outcomes
from experiments.study.over_x import up_to_goal
from experiments.study.pool import Here, workers
from experiments.study.report import write_report
from experiments.study.runs import Run, write_config
from experiments.study.search import Searched, searched, trials, with_found


def main(invocation: Invocation) -> None:
    """Run a study and write its report, or write the report alone.

    Exits with 1 where a run failed. Raises ExperimentError for a mistake in the study, before anything runs, and where
    nothing is left to report.
    """
    name, *argv = invocation.argv
    options = _parser(name).parse_args(argv)
    _check(options)
    study = read_study(options.study)
    folder = options.output or Path("runs/studies") / study.path.stem
    tried = trials(study, options.set, folder) if study.search is not None else []
    # Where there is a search, what the arms will be is not known before it has ended.
    arms = [trial.arm for trial in tried] or resolved(study, study.conditions(), options.set)
    chosen = chosen_metric(study, arms)
    search, failed = None, False
    with _running(study, arms, options, invocation.trusted, folder) if name == "study" else nullcontext() as make:
        if study.search is not None:
            if make is not None:
                of_trials = [run for trial in tried for run in trial.runs]
                failed = make(of_trials, f"val/{arms[0].monitor.name}", "search")
            search = searched(study.search, tried)
            _tell_left_out(search)
            arms = resolved(study, with_found(study.conditions(), search), options.set)
        every, runs = [Run(arm, seed, folder) for arm in arms for seed in study.seeds], list[Run]()
        while len(now := up_to_goal(study, every, chosen)) > len(runs):
            runs = now
            if make is not None:
                outcomes(runs, chosen[0])  # one that no finished run has logged is a mistake now
                failed = make(runs, chosen[0]) or failed
    if make is None or any(of.result is not None for of in runs):
        command = ["study", str(options.study), *(word for change in options.set for word in ("--set", change))]
        command += ["--output", str(folder)] if options.output else []
        arms = list({of.arm.key: of.arm for of in runs}.values())
        table = write_report(study, arms, runs, chosen, folder, command, search, _trust(invocation.trusted))
        print(f"\n{table}\n\nwritten: {folder / 'report.html'}")
    if failed:
        raise SystemExit(1)


def _tell_left_out(search: Searched) -> None:
    """Raises ExperimentError where no arm is left."""
    why = [f"{arm}: {why}." for arm, why in search.left_out.items()]
    if not search.found:
        raise ExperimentError(f"study: search: no arm has a value. {' '.join(why)}")
    for line in why:
        print(f"study: search: left out: {line}", file=sys.stderr)


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


@contextmanager
def _running(
    study: Study, arms: Sequence[Arm], options: Namespace, trusted: Sequence[str], folder: Path
) -> "Iterator[_Runner]":
    """Within, this process alone makes runs in the folder, and SIGTERM stops them as Ctrl-C does."""
    _warn_of_the_clock(arms)
    with locked(folder) as lock, _terminable(), workers(1 if study.keep else options.jobs or 1) as pool:
        start: Callable[[Job], Running] = (
            partial(Process, lock=lock) if study.keep else lambda job: Here(job.argv(), job.run.log, pool)
        )
        yield _Runner(study, options, trusted, start)


class _Runner:
    """Makes the runs that are not finished, on this machine or on a cluster, which it joins once."""

    def __init__(
        self, study: Study, options: Namespace, trusted: Sequence[str], start: Callable[[Job], Running]
    ) -> None:
        self._study, self._options, self._start = study, options, start
        self._trust = _trust(trusted)
        self._at_once = options.jobs or 1
        self._threads = max(1, _processors() // self._at_once)
        self._is_joined = False

    def __call__(self, runs: Sequence[Run], metric: str, part: str = "") -> bool:
        """Make them, tell what those that failed said, and return whether any did; for `part` see `Board`."""
        missing = [run for run in runs if run.result is None]
        if self._options.cluster and missing and not self._is_joined:
            from experiments.study.cluster import connect  # Ray is an extra

            self._start, self._at_once = connect(self._options.cluster, self._study.cluster)
            self._threads, self._is_joined = int(self._study.cluster.cpus), True
        at_once = min(self._at_once, max(1, len(missing)))
        for run in missing:
            write_config(run)
        jobs = [Job(run, [*_threads(run, self._threads), *self._trust], self._study.keep) for run in missing]
        print(
            f"{part and part + ': '}{len(runs)} runs: {len(runs) - len(missing)} finished, {len(missing)} to run, "
            f"{at_once} at once, {self._threads} threads each where the config does not say.",
            flush=True,
        )
        with Board(runs, missing, metric, at_once, part) as board:
            run_all(jobs, self._start, at_once, board)
        if board.failed:
            print(f"\n{board.errors()}", file=sys.stderr)
        return bool(board.failed)


def _processors() -> int:
    """How many this process may use; all there are where the system does not say, as on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _trust(modules: Sequence[str]) -> list[str]:
    return [word for module in modules for word in ("--trust", module)]


def _threads(run: Run, threads: int) -> list[str]:
    return [] if run.arm.settings["threads"] else [f"--threads={threads}"]


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
