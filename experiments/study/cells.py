"""The cells of a study: an arm with a seed, the folder of its run, and how far that run is."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning import LightningDataModule

from experiments.core.checkpoints import read_checkpoint
from experiments.core.command_line import mistake_message
from experiments.core.errors import ExperimentError, building, write_text, writing
from experiments.core.parsed import Parsed
from experiments.core.result_file import read_result
from experiments.core.run_folder import RunFolder
from experiments.core.task import Monitor, Task
from experiments.study.definition import Study, refuse_own

# What changes no result: where things lie, what is shown, how often a run saves. The number of threads changes the
# order of sums, which is rounding; it must not rerun a study on a machine with other cores.
WITHOUT_EFFECT = (
    "name", "base", "config", "ckpt_path", "seed_everything", "save_every", "tensorboard", "threads",
    "data.root", "data.init_args.root", "trainer.default_root_dir", "trainer.enable_progress_bar",
    "trainer.enable_model_summary", "trainer.logger", "trainer.profiler",
)  # fmt: skip


class Arm(NamedTuple):
    """An arm with every setting of its runs."""

    name: str
    key: str  # of all settings that change results
    settings: dict[str, Any]
    monitor: Monitor


class Cell(NamedTuple):
    """One run of a study."""

    arm: Arm
    seed: int
    root: Path  # of the study's files

    @property
    def id(self) -> tuple[str, int]:
        return self.arm.key, self.seed

    @property
    def label(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def of_arm(self) -> Path:
        return self.root / "cells" / self.arm.key

    @property
    def log(self) -> Path:
        return self.of_arm / f"seed_{self.seed}.log"

    @property
    def run(self) -> RunFolder:
        """The run's files, there or not."""
        path = self.of_arm / f"seed_{self.seed}" / "version_0"
        return RunFolder(self.of_arm, f"seed_{self.seed}", path / "checkpoints" / "last.ckpt")

    @property
    def result(self) -> dict[str, Any] | None:
        """What came of it; None before it is finished."""
        return read_result(self.run.result)

    @property
    def command(self) -> list[str]:
        """The arguments of `python -m experiments` that make the run."""
        place = (f"--name=seed_{self.seed}", f"--trainer.default_root_dir={self.of_arm}")
        return ["fit", "--config", str(self.of_arm / "config.yaml"), f"--seed_everything={self.seed}", *place]


def resolved(
    study: Study,
    changes: Sequence[str],  # KEY=VALUE, for all arms
    trusted: list[str],
) -> list[Arm]:
    """The arms with all their settings; their tasks, data and where its size is known their networks are built once.

    Raises: ExperimentError for the first arm with a mistake, and for two that are the same.
    """
    options = []
    for change in changes:
        key, equals, _ = change.partition("=")
        if not equals or not key:
            raise ExperimentError(f"study: --set {change}: expected KEY=VALUE, as --set trainer.max_steps=100.")
        refuse_own(key, f"study: --set {change}")
        options.append(f"--{change}")
    arms: dict[str, Arm] = {}
    for name, settings in study.arms.items():
        # Each key by itself, so that one can choose a class and the next a setting of it.
        given = [_as_option(key, value) for part in (study.settings, settings) for key, value in part.items()]
        arm = _arm(name, ["fit", "--config", str(study.base), *given, *options], trusted)
        if arm.key in arms:
            raise ExperimentError(
                f"study: the arms '{arms[arm.key].name}' and '{name}' have the same settings, expected a difference."
            )
        arms[arm.key] = arm
    return list(arms.values())


def write_config(cell: Cell) -> None:
    """Write the config of the cell's arm, which its command names. Raises ExperimentError where that fails."""
    with writing(cell.of_arm):
        cell.of_arm.mkdir(parents=True, exist_ok=True)
    write_text(cell.of_arm / "config.yaml", yaml.safe_dump(cell.arm.settings, sort_keys=False))


def next_command(cell: Cell) -> list[str]:
    """The command that makes the cell's run, or goes on with it where it left a checkpoint.

    What a run left without one is cleared away. Raises ExperimentError where that fails.
    """
    last = cell.run.last
    with suppress(ExperimentError):
        read_checkpoint(last)
        return [*cell.command, "--ckpt_path", str(last)]
    with writing(cell.of_arm):
        cell.log.unlink(missing_ok=True)
        if (cell.of_arm / f"seed_{cell.seed}").exists():
            shutil.rmtree(cell.of_arm / f"seed_{cell.seed}")
    return cell.command


def _as_option(key: str, value: Any) -> str:
    return f"--config={yaml.safe_dump({key: value}, default_flow_style=True, width=float('inf')).strip()}"


def _arm(name: str, argv: list[str], trusted: list[str]) -> Arm:
    try:
        parsed = Parsed(argv, trusted)
        _check_network(parsed.model, parsed.datamodule)
    except Exception as error:
        if (message := mistake_message(error)) is None:
            raise
        raise ExperimentError(f"study: arm '{name}': {message}") from error
    return Arm(name, key_of(parsed.settings), parsed.settings, parsed.model.monitor)


def _check_network(task: Task, data: LightningDataModule | None) -> None:
    """Raises ExperimentError for a network that cannot be built, where it can be known without the data."""
    try:
        description = task.imagined(data, {})
    except ExperimentError:
        return
    with torch.device("meta"), building(f"{type(task).__name__}: the network"):
        task.build(description)


def key_of(settings: dict[str, Any]) -> str:
    """A hash of the settings, without those `WITHOUT_EFFECT` on results."""
    kept = json.loads(json.dumps(settings))
    for path in WITHOUT_EFFECT:
        *above, last = path.split(".")
        inside = kept
        for part in above:
            inside = inside.get(part) or {}
        if isinstance(inside, dict):
            inside.pop(last, None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
