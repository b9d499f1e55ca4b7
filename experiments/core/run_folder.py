"""A run's folder, `ROOT/NAME/version_N`: metrics, histograms, the result. Reading needs nothing that trains."""

import csv
import io
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.core.errors import ExperimentError, copy, write_text, writing

_COLUMNS = ("step", "of", "low", "high", "count")  # of a histogram
_LIBRARIES = ("torch", "lightning")
_RESULT = {"metrics", "best_step", "steps", "diverged_at", "parameters", "seconds_per_step"}


class RunFolder:
    """The files of one run: `config.yaml`, `metrics.csv`, `curves.png`, `checkpoints/best.ckpt` and `last.ckpt`.

    One that is finished has `result.yaml` too.

    A run that goes on from a folder's `last.ckpt` stays in that folder. One that starts from any other checkpoint gets
    a folder of its own, so that nothing of the old run is overwritten.

    Raises: ExperimentError for a name that is no place below the root, and for a folder that cannot be made or written.
    """

    def __init__(self, root: Path, name: str, checkpoint: Path | None = None) -> None:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or not name.isprintable():
            raise ExperimentError(f"name: got {name!r}, expected that of a folder below {root}, on one line.")
        self._parent = root / name
        self._checkpoint = checkpoint
        self._path: Path | None = None
        self._is_made = False
        self._copied: set[tuple[Path, int]] = set()  # as by `_of_worth`
        self.is_resumed = checkpoint is not None and _is_a_runs_last(checkpoint)
        if self.is_resumed:
            assert checkpoint is not None
            self._path = checkpoint.parent.parent

    @property
    def path(self) -> Path:
        """The folder; there after `make`."""
        assert self._path is not None
        return self._path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def result(self) -> Path:
        return self.path / "result.yaml"

    def make(self) -> None:
        """Make the folder and see that it can be written to."""
        if self._path is None:
            self._path = new_folder(self._parent)
            self._is_made = True
        with self._discarding(), writing(self._path):
            self.checkpoints.mkdir(exist_ok=True)
            if self._checkpoint is not None and not self.is_resumed:
                self._copy_from(self._checkpoint)

    def share(self, broadcast: Callable[[Path | None], Path | None]) -> None:
        """Let every process know the folder that the first one made."""
        self._path = broadcast(self._path)

    def discard(self) -> None:
        """Take away what `make` made, where no step was trained: never a folder with a checkpoint or metrics in it."""
        if self._is_made and not _of_worth(self.path) - self._copied:
            shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        """Leaves no folder where it cannot be filled."""
        try:
            yield
        except BaseException:
            self.discard()
            raise

    def _copy_from(self, checkpoint: Path) -> None:
        """What the run was until the checkpoint: its metrics, and its best checkpoint."""
        metrics = checkpoint.parent.parent / "metrics.csv"
        if metrics.is_file():
            shutil.copyfile(metrics, self.metrics)  # no second name: rows are added to it
        best = checkpoint.with_name("best.ckpt")
        if best.is_file():
            copy(best, self.best)
        self._copied = _of_worth(self.path)


def new_folder(parent: Path) -> Path:
    """A folder `version_N` that was not there, made below the parent. Raises ExperimentError where that fails."""
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        taken = [path.name.removeprefix("version_") for path in parent.glob("version_*")]
        version = max((int(number) for number in taken if number.isdecimal()), default=-1) + 1
        while True:
            path = parent / f"version_{version}"
            try:
                path.mkdir()
            except FileExistsError:  # another run that starts at this moment
                version += 1
            else:
                return path


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


def _of_worth(folder: Path) -> set[tuple[Path, int]]:
    """The checkpoints and metrics below the folder, with their sizes."""
    files = [path for path in folder.rglob("*") if path.suffix == ".ckpt" or path.name == "metrics.csv"]
    return {(path, path.stat().st_size) for path in files}


def _is_a_runs_last(checkpoint: Path) -> bool:
    return checkpoint.name == "last.ckpt" and checkpoint.absolute().parent.name == "checkpoints"
