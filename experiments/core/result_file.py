"""`result.yaml`: what came of a finished run, for whoever compares runs."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.core.errors import write_text

_LIBRARIES = ("torch", "lightning")
_CONTENT = {"metrics", "best_step", "steps", "diverged_at", "parameters", "seconds_per_step"}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write what came of a run, with the versions that made it. The file is written last: a run with it is finished.

    Args:
        path: the file.
        result: `metrics`, those of the best checkpoint by their logged names; `best_step`, None where there is none;
            `steps` trained; `diverged_at`, the first step whose loss was no finite number, or None; `parameters`;
            `seconds_per_step` of training, or None.

    Raises: ExperimentError where the file cannot be written.
    """
    assert result.keys() == _CONTENT
    versions = {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
    where = {"threads": torch.get_num_threads(), "versions": versions}
    write_text(path, yaml.safe_dump(result | where, sort_keys=False))


def read_result(path: Path) -> dict[str, Any] | None:
    """What `write_result` wrote; None where there is no such file, or a damaged one."""
    try:
        result = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    is_whole = isinstance(result, dict) and result.keys() >= _CONTENT and isinstance(result["metrics"], dict)
    return result if is_whole else None
