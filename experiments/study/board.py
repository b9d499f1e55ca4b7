"""How far a study is: a live table in a terminal, plain lines elsewhere."""

import re
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.study.outcomes import last_words, scores, without_message
from experiments.study.runs import Run

_LEFT = re.compile(r"\bleft (?:(\d+) days?, )?(\d+):(\d+):(\d+)")
_STEP = re.compile(r"\bstep (\d+)\b")
_LINES_OF_AN_ERROR = 5


class Board:
    """Shows the runs of a study while they run, and remembers those that failed.

    Args:
        runs: all runs.
        to_run: those that are run now, in the order of the jobs.
        metric: what is shown of a finished run.
        at_once: how many run beside each other.
        part: the part of the study that these runs are, where they are not the last.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        to_run: Sequence[Run],
        metric: str,
        at_once: int,
        part: str = "",
    ) -> None:
        self.failed: dict[int, int] = {}  # exit codes
        self._runs, self._to_run, self._metric, self._at_once = runs, to_run, metric, at_once
        self._began: dict[int, float] = {}
        self._took: dict[int, float] = {}
        now = {run.id for run in to_run}
        self._done = {run.id: self._score(run) for run in runs if run.id not in now}
        console = Console()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._drawn_at = 0.0
        self._is_told = False
        self._part = part

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._draw()
            self._live.stop()

    def started(self, index: int) -> None:
        self._began[index] = time.monotonic()
        if self._live is None:
            print(f"started: {self._to_run[index].label}", flush=True)

    def ended(self, index: int, code: int) -> None:
        run = self._to_run[index]
        took = time.monotonic() - self._began[index]
        if code == 0 or run.result is not None:  # one that diverged is finished, but no success
            self._took[index] = took
            shown = self._done[run.id] = self._score(run)
            self._tell_once_without(run)
        else:
            self.failed[index] = code
            self._done[run.id] = "failed"
            shown = f"failed with exit code {code}: {last_words(run)}"
        if self._live is None:
            print(f"[{self._progress()}] {run.label}: {shown} after {_clock(took)}; {self._time_left()}", flush=True)

    def waiting(self) -> None:
        if self._live is not None and time.monotonic() - self._drawn_at > 1:
            self._draw()

    def errors(self) -> str:
        """What the runs that failed said last."""
        shown = []
        for index in sorted(self.failed):
            run = self._to_run[index]
            said = last_words(run, _LINES_OF_AN_ERROR).replace("\n", "\n    ")
            shown.append(f"failed: {run.label} (exit code {self.failed[index]}, log {run.log})\n    {said}")
        return "\n".join(shown)

    def _draw(self) -> None:
        assert self._live is not None
        self._drawn_at = time.monotonic()
        seeds = sorted({run.seed for run in self._runs})
        table = Table("arm", *(f"seed {seed}" for seed in seeds))
        running = {self._to_run[i].id: self._to_run[i] for i in self._running()}
        for arm in {run.arm.key: run.arm for run in self._runs}.values():
            shown = []
            for seed in seeds:
                state = self._done.get((arm.key, seed))
                if state is None and (arm.key, seed) in running:
                    step = _STEP.search(last_words(running[arm.key, seed]))
                    state = f"step {step[1]}" if step else "running"
                shown.append(Text(state or "·"))
            table.add_row(Text(arm.label), *shown)
        self._live.update(Group(table, Text(f"{self._progress()}; {self._time_left()}")), refresh=True)

    def _running(self) -> list[int]:
        return [index for index in self._began if index not in self._took and index not in self.failed]

    def _progress(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        of = f"{self._part}: " if self._part else ""
        return f"{of}{len(self._done)} of {len(self._runs)}{failed}"

    def _time_left(self) -> str:
        """From the runs that are through, and what those that run say themselves."""
        now, running = time.monotonic(), self._running()
        own = {index: _left(last_words(self._to_run[index])) for index in running}
        whole = list(self._took.values()) or [
            now - self._began[i] + left for i, left in own.items() if left is not None
        ]
        if not whole:
            return "time left not known yet"
        mean = sum(whole) / len(whole)
        seconds = mean * (len(self._to_run) - len(self._began))
        for index in running:
            left = own[index]
            seconds += max(mean - (now - self._began[index]), 0) if left is None else left
        return f"about {_clock(seconds / self._at_once)} left{f' of the {self._part}' if self._part else ''}"

    def _tell_once_without(self, run: Run) -> None:
        """Say at once that a run is without the metric: its name may be wrong, and the other runs last."""
        result = run.result
        if result is None or result["diverged_at"] is not None or scores(result, self._metric):
            return
        if not self._is_told:
            print(f"study: {without_message(run, self._metric, result['metrics'])}", file=sys.stderr)
        self._is_told = True

    def _score(self, run: Run) -> str:
        result = run.result
        if result is None:
            return "no result"
        if result["diverged_at"] is not None:
            return "diverged"
        values = scores(result, self._metric).values()
        return ", ".join(f"{value:.4f}" for value in values) or f"no {self._metric}"


def _left(line: str) -> float | None:
    """The seconds that a run's own progress line says are left."""
    found = _LEFT.search(line)
    if found is None:
        return None
    days, *clock = (int(number or 0) for number in found.groups())
    return 86400 * days + 3600 * clock[0] + 60 * clock[1] + clock[2]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
