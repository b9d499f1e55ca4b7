"""The arms of a study with every setting of their runs, and the key that says which runs are the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from lightning import Trainer

from experiments.core.command_line import mistake_message
from experiments.core.errors import ExperimentError, building
from experiments.core.loading import RunSettings
from experiments.core.network_size import without_memory
from experiments.core.task import Data, Monitor, Task
from experiments.study.checks import refuse_own
from experiments.study.definition import Condition, Settings, Study

# What changes no result: where things lie, what is shown, how often a run saves. The number of threads changes the
# order of sums, which is rounding; it must not rerun a study on a machine with other cores.
WITHOUT_EFFECT = (
    "name", "base", "config", "ckpt_path", "seed_everything", "save_every", "tensorboard", "threads",
    "data.root", "data.init_args.root", "trainer.default_root_dir", "trainer.enable_progress_bar",
    "trainer.enable_model_summary", "trainer.logger", "trainer.profiler",
)  # fmt: skip


class Arm(NamedTuple):
    """An arm, in one panel and at one value of the axis where there are such, with every setting of its runs."""

    name: str
    key: str  # of all settings that change results
    settings: Settings
    monitor: Monitor
    panel: str = ""
    level: float | str | None = None

    @property
    def label(self) -> str:
        return shown(Condition(self.panel, self.name, self.level))


def shown(condition: Condition) -> str:
    """The condition in one line."""
    return ", ".join(str(part) for part in condition if part not in ("", None))


def resolved(
    study: Study,
    conditions: Mapping[Condition, Sequence[Settings]],
    changes: Sequence[str],  # KEY=VALUE, for all arms
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
    for condition, parts in conditions.items():
        # Each key by itself, so that one can choose a class and the next a setting of it.
        given = [_as_option(key, value) for part in parts for key, value in part.items()]
        arm = _arm(condition, ["fit", "--config", str(study.base), *given, *options])
        if arm.key in arms:
            raise ExperimentError(
                f"study: the arms '{arms[arm.key].label}' and '{arm.label}' have the same settings, expected a "
                "difference."
            )
        arms[arm.key] = arm
    return list(arms.values())


def _as_option(key: str, value: Any) -> str:
    return f"--config={yaml.safe_dump({key: value}, default_flow_style=True, width=float('inf')).strip()}"


def _arm(condition: Condition, argv: list[str]) -> Arm:
    try:
        parsed = RunSettings(argv, Trainer)
        _check_network(parsed.task, parsed.data)
    except Exception as error:
        if (message := mistake_message(error)) is None:
            raise
        raise ExperimentError(f"study: arm '{shown(condition)}': {message}") from error
    settings = parsed.plain
    panel, name, level = condition
    return Arm(name, key_of(settings), settings, parsed.task.monitor, panel, level)


def _check_network(task: Task, data: Data | None) -> None:
    """Raises ExperimentError for a network that cannot be built, where it can be known without the data."""
    try:
        description = task.imagined(data, {})
    except ExperimentError:
        return
    with without_memory(), building(f"{type(task).__name__}: the network"):
        task.build(description)


def key_of(settings: Settings) -> str:
    """A hash of the settings, without those `WITHOUT_EFFECT` on results. With the seed it tells a run from others."""
    kept = json.loads(json.dumps(settings))
    for path in WITHOUT_EFFECT:
        *above, last = path.split(".")
        inside = kept
        for part in above:
            inside = inside.get(part) or {}
        if isinstance(inside, dict):
            inside.pop(last, None)
    _give_arguments(kept)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _give_arguments(settings: Any) -> None:
    """Give every class `init_args`: of one without settings, jsonargparse leaves them empty or out."""
    if isinstance(settings, dict) and "class_path" in settings:
        settings.setdefault("init_args", {})
    for value in settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ():
        _give_arguments(value)
