"""Making many short runs in few processes, which spares each the start of one."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

from experiments.core.errors import ExperimentError


class Here:
    """A command of `python -m experiments` in this process, or in one of a pool, with its output in the log.

    Raises: SystemExit where a run in this process was interrupted, ExperimentError where one of the pool has died.
    """

    def __init__(self, argv: Sequence[str], log: Path, pool: Executor | None) -> None:
        self._future: Future[int] = Future()
        if pool is None:
            self._future.set_result(code := run_here(argv, log))
            if code > 128:
                raise SystemExit(code)
            return
        try:
            self._future = pool.submit(run_here, argv, log)
        except BrokenExecutor as error:
            raise ExperimentError(
                "study: a process that made runs has died, perhaps for lack of memory. What is finished is kept: run "
                "the study again, with fewer --jobs."
            ) from error

    def poll(self) -> int | None:
        if not self._future.done():
            return None
        return 1 if self._future.exception() else self._future.result()

    def stop(self, number: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()


@contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """A pool of so many processes; None for one, which is this one."""
    if count == 1:
        yield None
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin_worker) as pool:
        yield pool


def _begin_worker() -> None:
    """Leave Ctrl-C to the process that began this one, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_here(argv: Sequence[str], log: Path) -> int:
    """Do in this process what `python -m experiments` does, with its output in the log, and return the exit code."""
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return import_module("experiments.__main__").main(argv)
        except Exception:  # a fault of the program's, with which no other run is to end
            traceback.print_exc()
            return 1
