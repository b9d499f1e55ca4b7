"""What a run records in its folder: metrics, histograms, and the result. Reading them needs nothing that trains."""

import csv
import io
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.core.errors import ExperimentError, write_text

_COLUMNS = ("step", "of", "low", "high", "count")  # of a histogram
_LIBRARIES = ("torch", "lightning")
_RESULT = {"metrics", "best_step", "steps", "diverged_at", "parameters", "seconds_per_step"}


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, each with what it has a value for; none where there is no file.

    A last row that was being written when the run was killed is left out.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{name: value for name, value in row.items() if value} for row in csv.DictReader(lines)]


class Histogram(NamedTuple):
    """How values were distributed at a step of training."""

    step: int
    of: str  # what they are of, where a run has several; else ""
    edges: Sequence[float]  # one more than bins
    counts: Sequence[int]  # by bin


def write_histograms(path: Path, histograms: Sequence[Histogram]) -> None:
    """Write them to a file, a row for each bin. Raises ExperimentError where that fails."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for step, of, edges, counts in histograms:
        writer.writerows(zip([step] * len(counts), [of] * len(counts), edges[:-1], edges[1:], counts, strict=True))
    write_text(path, text.getvalue())


def read_histograms(path: Path) -> list[Histogram]:
    """What `write_histograms` wrote; none where there is no file. Raises ExperimentError for a damaged one."""
    if not path.is_file():
        return []
    read: dict[tuple[int, str], tuple[list[float], list[int]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                edges, counts = read.setdefault((int(row["step"]), row["of"]), ([float(row["low"])], []))
                edges.append(float(row["high"]))
                counts.append(int(row["count"]))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ExperimentError(f"{path}: no file of histograms that a run wrote ({error}).") from error
    return [Histogram(step, of, edges, counts) for (step, of), (edges, counts) in read.items()]


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write what came of a run, with the versions that made it. The file is written last: a run with it is finished.

    Args:
        path: the file.
        result: `metrics`, those of the best checkpoint by their logged names; `best_step`, None where there is none;
            `steps` trained; `diverged_at`, the first step whose loss was no finite number, or None; `parameters`;
            `seconds_per_step` of training, or None.

    Raises: ExperimentError where the file cannot be written.
    """
    assert result.keys() == _RESULT
    import torch  # which reading need not wait for

    versions = {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
    where = {"threads": torch.get_num_threads(), "versions": versions}
    write_text(path, yaml.safe_dump(result | where, sort_keys=False))


def read_result(path: Path) -> dict[str, Any] | None:
    """What `write_result` wrote; None where there is no such file, or a damaged one."""
    try:
        result = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    is_whole = isinstance(result, dict) and result.keys() >= _RESULT and isinstance(result["metrics"], dict)
    return result if is_whole else None
