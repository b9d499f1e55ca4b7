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

from experiments.study.cells import Arm, Cell
from experiments.study.outcomes import last_words, without_message

_LEFT = re.compile(r"\bleft (?:(\d+) days?, )?(\d+):(\d+):(\d+)")
_STEP = re.compile(r"\bstep (\d+)\b")
_LINES_OF_AN_ERROR = 5


class Board:
    """Shows the cells of a study while they run, and remembers those that failed.

    Args:
        arms: the rows.
        cells: all cells.
        to_run: those that are run now, in the order of the jobs.
        metric: what is shown of a finished cell.
        at_once: how many run beside each other.
        part: the part of the study that these cells are, where they are not the last.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        cells: Sequence[Cell],
        to_run: Sequence[Cell],
        metric: str,
        at_once: int,
        part: str = "",
    ) -> None:
        self.failed: dict[int, int] = {}  # exit codes
        self._arms, self._cells, self._to_run, self._metric, self._at_once = arms, cells, to_run, metric, at_once
        self._began: dict[int, float] = {}
        self._took: dict[int, float] = {}
        now = {cell.id for cell in to_run}
        self._done = {cell.id: self._score(cell) for cell in cells if cell.id not in now}
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
        cell = self._to_run[index]
        took = time.monotonic() - self._began[index]
        if code == 0 or cell.result is not None:  # one that diverged is finished, but no success
            self._took[index] = took
            shown = self._done[cell.id] = self._score(cell)
            self._tell_once_without(cell)
        else:
            self.failed[index] = code
            self._done[cell.id] = "failed"
            shown = f"failed with exit code {code}: {last_words(cell)}"
        if self._live is None:
            print(f"[{self._progress()}] {cell.label}: {shown} after {_clock(took)}; {self._time_left()}", flush=True)

    def waiting(self) -> None:
        if self._live is not None and time.monotonic() - self._drawn_at > 1:
            self._draw()

    def errors(self) -> str:
        """What the cells that failed said last."""
        shown = []
        for index in sorted(self.failed):
            cell = self._to_run[index]
            said = last_words(cell, _LINES_OF_AN_ERROR).replace("\n", "\n    ")
            shown.append(f"failed: {cell.label} (exit code {self.failed[index]}, log {cell.log})\n    {said}")
        return "\n".join(shown)

    def _draw(self) -> None:
        assert self._live is not None
        self._drawn_at = time.monotonic()
        seeds = sorted({cell.seed for cell in self._cells})
        table = Table("arm", *(f"seed {seed}" for seed in seeds))
        running = {self._to_run[i].id: self._to_run[i] for i in self._running()}
        for arm in self._arms:
            shown = []
            for seed in seeds:
                state = self._done.get((arm.key, seed))
                if state is None and (arm.key, seed) in running:
                    step = _STEP.search(last_words(running[arm.key, seed]))
                    state = f"step {step[1]}" if step else "running"
                shown.append(Text(state or "·"))
            table.add_row(Text(arm.name), *shown)
        self._live.update(Group(table, Text(f"{self._progress()}; {self._time_left()}")), refresh=True)

    def _running(self) -> list[int]:
        return [index for index in self._began if index not in self._took and index not in self.failed]

    def _progress(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        of = f"{self._part}: " if self._part else ""
        return f"{of}{len(self._done)} of {len(self._cells)}{failed}"

    def _time_left(self) -> str:
        """From the cells that are through, and what those that run say themselves."""
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

    def _tell_once_without(self, cell: Cell) -> None:
        """Say at once that a run is without the metric: its name may be wrong, and the other runs last."""
        result = cell.result
        if result is None or result["diverged_at"] is not None or self._metric in result["metrics"]:
            return
        if not self._is_told:
            print(f"study: {without_message(cell, self._metric, result['metrics'])}", file=sys.stderr)
        self._is_told = True

    def _score(self, cell: Cell) -> str:
        result = cell.result
        if result is None:
            return "no result"
        if result["diverged_at"] is not None:
            return "diverged"
        value = result["metrics"].get(self._metric)
        return f"no {self._metric}" if value is None else f"{value:.4f}"


def _left(line: str) -> float | None:
    """The seconds that a run's own progress line says are left."""
    found = _LEFT.search(line)
    if found is None:
        return None
    days, *clock = (int(number or 0) for number in found.groups())
    return 86400 * days + 3600 * clock[0] + 60 * clock[1] + clock[2]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
