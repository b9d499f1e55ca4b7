"""Reading a checkpoint: its content, and the task with its trained network."""

import argparse
import pickle
import pkgutil
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from experiments.core.errors import ExperimentError
from experiments.core.run_settings import built_task
from experiments.core.task import Task
from experiments.core.trust import refusal


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's content, its tensors still on disk.

    Raises ExperimentError for a file that is not there, is damaged, or holds more than values: code could run.
    """
    if path.is_dir():
        raise ExperimentError(f"{path}: a folder, and no run's: expected runs/NAME/version_N, or a checkpoint in it.")
    if not path.is_file():
        raise ExperimentError(f"{path}: no such checkpoint.")
    _check_content(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise ExperimentError(
            f"{path}: refused: it holds more than values{what}, and to load that may run code."
        ) from error
    except Exception as error:  # whatever it is, the file is its cause
        raise ExperimentError(f"{path}: no checkpoint that `fit` wrote: {_first_lines(error)}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ExperimentError(f"{path}: not a checkpoint that `fit` wrote: it has no state_dict.")
    return checkpoint


def _check_content(path: Path) -> None:
    """Raises ExperimentError for a file that `torch.save` did not write, or that has changed since.

    Such a file is a zip archive with a checksum of each part, which `torch.load` does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except Exception as error:  # a damaged archive raises whatever its bytes cause
        what = "damaged, or no checkpoint" if path.stat().st_size else "empty"
        raise ExperimentError(f"{path}: {what}: expected a file that `fit` wrote.") from error
    if changed is not None:
        raise ExperimentError(f"{path}: damaged: the checksum of {changed} in it is wrong. Take another checkpoint.")


def load_task(path: Path) -> Task:
    """The task of a checkpoint that `fit` wrote, with its trained network, on the CPU.

    Its classes are built from the settings that it holds; `experiments.core.trust` limits what these may name.
    Raises ExperimentError for a checkpoint of something else, or without settings.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters")
    if not isinstance(settings, dict) or not isinstance(name := settings.get("_class_path"), str):
        raise ExperimentError(f"{path}: not a checkpoint of a task that `fit` wrote (it names no task).")
    if reason := refusal(name):
        raise ExperimentError(f"{path}: not a checkpoint of a task that `fit` wrote ({reason}).")
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ExperimentError(
            f"{path}: not a checkpoint of a task that `fit` wrote (this version has no task {name})."
        ) from error
    given = {key: value for key, value in settings.items() if key[0] != "_"}
    try:
        task = built_task({"class_path": name, "init_args": given})
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        cause: BaseException = error  # the first one, around which each level of the settings wraps its own words
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ImportError) and any(map(refusal, str(cause).split("'"))):
            raise  # a class that is not trusted
        raise ExperimentError(
            f"{path}: this version cannot use its settings: {_first_lines(cause)}. Give a checkpoint that it wrote, or "
            "go back to the version that wrote this one."
        ) from error
    load_weights(task, checkpoint)
    return task


def load_weights(task: Task, checkpoint: dict[str, Any]) -> None:
    """Give the task the network of a checkpoint, or its weights. Raises ExperimentError for one of another task."""
    task.take_up(checkpoint, is_to_train=True)
    assert task.network is not None
    weights = {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
    task.network.load_state_dict(weights)


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that is meant: of a run's folder its best one, or without a validation its last one."""
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    return path


def _first_lines(error: BaseException) -> str:
    """The first two lines of what it says: torch's first one alone says too little."""
    return " ".join(map(str.strip, str(error).splitlines()[:2])) or type(error).__name__
