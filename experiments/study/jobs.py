"""Making runs beside each other, in processes of this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple, Protocol

from experiments.study.runs import Run, leave_result, next_command

_POLL = 0.2  # seconds


class Job(NamedTuple):
    """A run to make, and what its command gets beside its own arguments."""

    run: Run
    options: list[str]
    keep: bool = True  # its folder

    def argv(self) -> list[str]:
        """The arguments of `python -m experiments` that make the run, or go on with it; see `next_command`."""
        return [*next_command(self.run), *self.options]


class Running(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def stop(self, number: int) -> None:
        """Send it a signal: SIGINT lets it save and end."""


class Observer(Protocol):
    """Who is told what happens; the jobs are counted as they were given."""

    def started(self, index: int) -> None: ...

    def ended(self, index: int, code: int) -> None: ...

    def waiting(self) -> None: ...


def run_all(
    jobs: Sequence[Job],
    start: Callable[[Job], Running],
    at_once: int,
    observer: Observer,
) -> list[int]:
    """Run the jobs, so many at once, and return their exit codes. One that fails stops no other.

    Where this process is interrupted, those that run are, and waited for: they save. A second Ctrl-C stops them at
    once, a third kills them.
    """
    codes: list[int | None] = [None] * len(jobs)
    left = list(range(len(jobs)))
    running: dict[int, Running] = {}
    try:
        while left or running:
            while left and len(running) < at_once:
                index = left.pop(0)
                observer.started(index)
                running[index] = start(jobs[index])
            for index, job in list(running.items()):
                if (code := job.poll()) is not None:
                    del running[index]
                    if not jobs[index].keep:
                        leave_result(jobs[index].run)
                    codes[index] = code
                    observer.ended(index, code)
            observer.waiting()
            if running:
                time.sleep(_POLL)
    finally:
        if running:
            _stop(list(running.values()))
    return [code for code in codes if code is not None]


def _stop(running: list[Running]) -> None:
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        for job in running:
            if job.poll() is None:
                job.stop(number)
        try:
            while any(job.poll() is None for job in running):
                time.sleep(_POLL)
        except KeyboardInterrupt:
            continue
        return


class Process:
    """A job in a process of its own, in its own group: the terminal's Ctrl-C is passed on once, and not twice.

    Args:
        job: the run.
        lock: held open by the process too, so that a study which was killed stays locked while its runs go on.
    """

    def __init__(self, job: Job, lock: IO[str]) -> None:
        command = [sys.executable, "-m", "experiments", *job.argv()]
        with job.run.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self, number: int) -> None:
        if number == signal.SIGKILL:
            os.killpg(self._process.pid, number)  # what it started too
        else:
            self._process.send_signal(number)
