"""How the benchmark measures: what agrees first, then times side by side; first calls and memory in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.bench.case import Case
from experiments.bench.cases import cases
from experiments.core.errors import ExperimentError
from multint.errors import in_a_line

# Seconds that one measurement takes at least: short runs are repeated within it.
SHORTEST = 0.02
LONGEST = 60.0  # that a contender without a rival is measured for
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class Rounds:
    """Times of our layer and a rival, taken in turns."""

    ours: list[float]  # seconds
    rival: list[float]

    @property
    def ratios(self) -> list[float]:
        """t(rival) / t(ours) of each round: higher is better."""
        return [rival / ours for ours, rival in zip(self.ours, self.rival, strict=True)]


@dataclass(frozen=True)
class Fresh:
    """What a contender shows in a process of its own."""

    first_call: float  # seconds, tracing and compilation included, but not the import of torch
    peak: int | None  # bytes that one run takes beyond what was there before; None where the system does not tell
    results: int  # bytes of these that it gives: outputs and gradients


def check(case: Case) -> None:
    """Raise unless our layer's output and gradients are those of the references, each by its norm."""
    ours = case.build("ours")() if case.references else []
    for reference in case.references:
        for i, (actual, expected) in enumerate(zip(ours, case.build(reference)(), strict=True)):
            error = float((actual - expected).detach().double().norm() / expected.detach().double().norm())
            if not error <= TOLERANCE[case.dtype]:
                what = "output" if i == 0 else f"gradient {i}"
                raise ExperimentError(f"{case.name}: our {what} is off by {error:.1e} from the {reference}'s")


def vendor_fault(case: Case) -> str | None:
    """Why the vendor's layer cannot run the case here, such as bf16 on a processor without it; None where it can."""
    if "vendor" not in case.rivals:
        return None
    run = case.build("vendor")
    try:
        run()
    except RuntimeError as error:
        return in_a_line(error)
    return None


def alone(case: Case, rounds: int) -> list[float]:
    """Our times in seconds, at most that many, for a case without a rival; after one run to warm up."""
    run = case.build("ours")
    first = _time(run, 1)
    return [_time(run, 1) for _ in range(max(1, min(rounds, int(LONGEST / first))))]


def side_by_side(case: Case, rival: str, rounds: int) -> Rounds:
    """Time our layer and the rival in turns, after some runs of each to warm up."""
    runs = [case.build(contender) for contender in ("ours", rival)]
    for _ in range(3):
        for run in runs:
            _time(run, 1)
    times = [1 + int(SHORTEST / _time(run, 1)) for run in runs]
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, count, column in zip(runs, times, taken, strict=True):
            column.append(_time(run, count))
    return Rounds(*taken)


def _time(run: Callable[[], list[Tensor]], count: int) -> float:
    """Seconds of one run, as the mean over so many."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def first_calls(case: Case) -> tuple[dict[str, Fresh], Fresh, Fresh]:
    """Each in a new process: the rivals that are told of, and ours, first with an empty cache of compiled code."""
    with tempfile.TemporaryDirectory() as cache:
        rivals = {who: _in_process(case.name, who, cache) for who in case.told}
        cold, warm = (_in_process(case.name, "ours", cache) for _ in range(2))
    return rivals, cold, warm


def _in_process(name: str, contender: str, cache: str) -> Fresh:
    command = [sys.executable, "-m", "experiments.bench.measure", name, contender, str(torch.get_num_threads())]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "MULTINT_CACHE_DIR": cache}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ExperimentError(f"{name}: {contender} failed in a process of its own:\n{done.stderr[-2000:]}")
    return Fresh(**json.loads(done.stdout.splitlines()[-1]))


def _fresh(name: str, contender: str) -> Fresh:
    (case,) = (case for case in cases() if case.name == name)
    run = case.build(contender)
    start = time.perf_counter()
    results = sum(result.numel() * result.element_size() for result in run())
    first_call = time.perf_counter() - start
    before = _reset_peak()
    run()
    return Fresh(first_call, None if before is None else _status("VmHWM") - before, results)


def _reset_peak() -> int | None:
    """Give back what the allocator holds, let peaks count from here, and return the bytes now in use."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(vars(_fresh(*sys.argv[1:3]))))
