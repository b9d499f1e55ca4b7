"""The runs of a study: an arm with a seed, where its files lie, and what came of it."""

import json
import shutil
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.core.errors import ExperimentError, write_text, writing
from experiments.core.loading import read_checkpoint
from experiments.core.run_folder import RunFolder, read_result
from experiments.study.arms import Arm


class Run(NamedTuple):
    """One run of a study."""

    arm: Arm
    seed: int
    root: Path  # of the study's files

    @property
    def id(self) -> tuple[str, int]:
        return self.arm.key, self.seed

    @property
    def label(self) -> str:
        return f"{self.arm.label}, seed {self.seed}"

    @property
    def of_arm(self) -> Path:
        return self.root / "runs" / self.arm.key

    @property
    def log(self) -> Path:
        return self.of_arm / f"seed_{self.seed}.log"

    @property
    def folder(self) -> RunFolder:
        """The run's files, there or not."""
        path = self.of_arm / f"seed_{self.seed}" / "version_0"
        return RunFolder(self.of_arm, f"seed_{self.seed}", path / "checkpoints" / "last.ckpt")

    @property
    def result(self) -> dict[str, Any] | None:
        """What came of it, with a folder or without one; None before it is finished."""
        return read_result(self.folder.result) or _results(self.root).get(self.id)

    @property
    def command(self) -> list[str]:
        """The arguments of `python -m experiments` that make the run."""
        place = (f"--name=seed_{self.seed}", f"--trainer.default_root_dir={self.of_arm}")
        return ["fit", "--config", str(self.of_arm / "config.yaml"), f"--seed_everything={self.seed}", *place]


def write_config(run: Run) -> None:
    """Write the config of the run's arm, which its command names. Raises ExperimentError where that fails."""
    with writing(run.of_arm):
        run.of_arm.mkdir(parents=True, exist_ok=True)
    write_text(run.of_arm / "config.yaml", yaml.safe_dump(run.arm.settings, sort_keys=False))


def next_command(run: Run) -> list[str]:
    """The command that makes the run, or goes on with it where it left a checkpoint.

    What a run left without one is cleared away. Raises ExperimentError where that fails.
    """
    last = run.folder.last
    with suppress(ExperimentError):
        read_checkpoint(last)
        return [*run.command, "--ckpt_path", str(last)]
    _clear(run)
    return run.command


def leave_result(run: Run) -> None:
    """Leave of a finished run a line of the study's `results.jsonl` alone. Raises ExperimentError where that fails."""
    if (result := read_result(run.folder.result)) is None:
        return
    lines = [*_results(run.root).values(), {"key": run.arm.key, "seed": run.seed, **result}]
    write_text(run.root / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    _clear(run)


def _clear(run: Run) -> None:
    with writing(run.of_arm):
        run.log.unlink(missing_ok=True)
        if (folder := run.of_arm / f"seed_{run.seed}").exists():
            shutil.rmtree(folder)


def _results(root: Path) -> dict[tuple[str, int], dict[str, Any]]:
    path = root / "results.jsonl"
    try:
        state = path.stat()
    except OSError:
        return {}
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)  # it is asked for every run
def _read(path: Path, *state: int) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines by key and seed. Raises ExperimentError for a file that `leave_result` did not write."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {(line["key"], line["seed"]): line for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path}: not what a study wrote there ({error}). Mend it, or take it away.") from error
