"""Histograms in a run's folder: a CSV file for each kind, for whoever draws them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.core.errors import ExperimentError, write_text

_COLUMNS = ("step", "of", "low", "high", "count")


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
