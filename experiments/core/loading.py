"""Loading what a run is of: task and data from all its settings, or a task with its weights from a checkpoint."""

import argparse
import pickle
import pkgutil
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import (
    SUPPRESS,
    ActionConfigFile,
    ArgumentParser,
    Namespace,
    get_loader,
    register_unresolvable_import_paths,
    set_loader,
)
from jsonargparse.typing import PositiveFloat, PositiveInt

from experiments.core.config_check import explain
from experiments.core.configs import check_extent, expanded
from experiments.core.errors import ExperimentError, building, mistake_in
from experiments.core.task import Data, Task
from experiments.core.trust import refusal
from multint import MultintError

register_unresolvable_import_paths(torch)  # functions such as torch.relu do not say where they are

_parsed_objects: dict[tuple[ArgumentParser, str, str, bool], Namespace] = {}  # of the parse under way, see `_Parser`

# Of these an empty text, as from an unset shell variable, would mean the current folder.
_NEVER_EMPTY = ("name", "ckpt_path", "base", "trainer.default_root_dir")


class RunSettings:
    """The settings of `fit`, `validate` or `test`, parsed and checked; nothing runs.

    Args:
        argv: the command's name, configs and options.
        trainer: the class whose settings are those of `trainer`; None where nothing is trained, and they are not looked
            at.

    Raises: ExperimentError for the user's mistakes, argparse.ArgumentError for what only jsonargparse finds.
    """

    def __init__(self, argv: Sequence[str], trainer: type | None = None) -> None:
        command, *options = argv
        self._parser = _parser(command, trainer)
        self._argv = expanded(options)
        self.config = _parsed(self._parser, self._argv)

    @cached_property
    def plain(self) -> dict[str, Any]:
        """Every setting, given or not, as plain values."""
        return yaml.safe_load(self.text(self.config))

    def text(self, config: Namespace) -> str:
        """A config as YAML, every setting in it."""
        return self._parser.dump(config, skip_unset=False, skip_validation=True, skip_link_targets=False)

    @cached_property
    def built(self) -> Namespace:
        """The config with its classes built."""
        with building("the classes of the config"), _explained(self._parser, self._argv):
            built = self._parser.instantiate(self.config)
        built.model.settings = _saved(self.plain["model"])
        return built

    @property
    def task(self) -> Task:
        """The task."""
        return self.built.model

    @property
    def data(self) -> Data | None:
        """The data; None for a task without."""
        return self.built.get("data")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Words a network that cannot be built within, where our own walk finds the class that does not fit."""
        try:
            yield
        except ExperimentError as error:
            if isinstance(error.__cause__, TypeError):
                explain(self._parser, self._argv)
            raise


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
        task = _built_task({"class_path": name, "init_args": given})
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
    """The checkpoint that is meant: of a run's folder its best one, or without a validation its last one.

    A folder that holds one run means that run, such as a study's folder of an arm and a seed.
    """
    versions = list(path.glob("version_*"))
    path = versions[0] if len(versions) == 1 else path
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    return path


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


def _built_task(spec: dict[str, Any]) -> Task:
    """The task of a `class_path` and its `init_args`. Raises what jsonargparse and the constructors do."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task", fail_untyped=False)
    # Without defaults, which the constructors have, and which jsonargparse would resolve at each level anew.
    task: Task = parser.instantiate(parser.parse_object({"task": spec}, defaults=False)).task
    task.settings = _saved(spec)
    return task


def _saved(spec: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as checkpoints hold them."""
    return {"_class_path": spec["class_path"], **spec.get("init_args", {}), **spec.get("dict_kwargs", {})}


def _first_lines(error: BaseException) -> str:
    """The first two lines of what it says: torch's first one alone says too little."""
    return " ".join(map(str.strip, str(error).splitlines()[:2])) or type(error).__name__


class _Parser(ArgumentParser):
    """jsonargparse's, whose own would take a second for a config.

    It has a parser for each class that a config names. Every level of these parses the one below several times, for its
    defaults, for what is given, and to validate both: from a network down to its integrator that is some hundred times.
    Here the same settings are parsed once, and a class's defaults are put in where they are missing in the end.
    """

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        if (defaults := vars(self).get("_resolved")) is None:
            defaults = self._resolved = super().get_defaults(*args, **kwargs)
        return defaults.clone()

    def parse_object(
        self, obj: Any, namespace: Any = None, env: Any = None, defaults: bool = True, **kwargs: Any
    ) -> Namespace:
        asked = self, repr(obj), repr(namespace), defaults
        if asked in _parsed_objects:
            try:
                self.validate(_parsed_objects[asked])  # which the first time it may not have been
            except (TypeError, KeyError) as error:
                self.error(str(error), error)
        else:
            given = super().parse_object(obj, namespace, env, defaults=False, **kwargs)
            _parsed_objects[asked] = _over(self.get_defaults(), given) if defaults else given
        return _parsed_objects[asked].clone()


def _over(defaults: Namespace, given: Namespace) -> Namespace:
    """The defaults, where nothing else is given; a class that is given has its own."""
    for name, value in vars(given).items():
        default = vars(defaults).get(name)
        is_group = all(isinstance(of, Namespace) and "class_path" not in of for of in (value, default))
        defaults[name] = _over(default, value) if is_group else value
    return defaults


@cache
def _parser(command: str, trainer: type | None) -> ArgumentParser:
    parser = _Parser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="A YAML file of settings (repeatable).")
    parser.add_argument(
        "--seed_everything", type=bool | int, default=0, help="The run's seed; true draws one, false leaves torch's."
    )
    if trainer is None:
        parser.add_argument("--trainer", type=dict, default={}, help=SUPPRESS)
    else:
        parser.add_class_arguments(trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)
        parser.set_defaults({"trainer.enable_autolog_hparams": False})
    parser.add_subclass_arguments(Task, "model", fail_untyped=False, required=True)
    parser.add_subclass_arguments(Data, "data", fail_untyped=False, required=False)
    parser.add_argument("--name", type=str, default="run", help="The run's folder below runs/.")
    parser.add_argument(
        "--threads",
        type=PositiveInt | None,
        default=None,
        help="CPU threads of torch, its own choice if null. Small networks are fastest with one.",
    )
    parser.add_argument(
        "--save_every", type=PositiveFloat, default=5.0, help="Minutes between two writes of last.ckpt."
    )
    parser.add_argument(
        "--tensorboard", type=bool, default=False, help="Write for TensorBoard too: pip install tensorboard."
    )
    parser.add_argument("--ckpt_path", type=str | None, default=None, help="The checkpoint to go on from, or to load.")
    if command != "fit":
        parser.add_argument("--verbose", type=bool, default=True, help="Print the metrics.")
    parser.add_argument("--base", type=str | None, default=None, help=SUPPRESS)  # read by `expanded`
    return parser


def _parsed(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    _parsed_objects.clear()
    with _explained(parser, argv):
        config = parser.parse_args(argv)
    _parsed_objects.clear()  # files may change until the next one
    for name in _NEVER_EMPTY:
        if config.get(name) == "":
            raise ExperimentError(f"{name}: '' is empty. Give a name, or leave the option out.")
    if not isinstance(config.trainer, Namespace | dict):  # a number, which jsonargparse takes for settings as they are
        raise ExperimentError(f"trainer: '{config.trainer}' does not fit: expected settings, NAME: VALUE")
    config.base = None  # its settings are here now
    return config


@contextmanager
def _explained(parser: ArgumentParser, argv: Sequence[str]) -> Iterator[None]:
    """Words what jsonargparse refuses within, where our own walk finds the mistake."""
    try:
        yield
    except Exception as error:
        # What a constructor says of its settings says more than a walk along signatures.
        if not isinstance(mistake_in(error), MultintError):
            explain(parser, argv)
        raise


def _load(text: str, **settings: Any) -> Any:
    check_extent(text, "a value")
    return _load_of_jsonargparse(text, **settings)


_load_of_jsonargparse = get_loader("yaml")
set_loader("yaml", _load, exceptions=(yaml.YAMLError,))  # so that nobody walks a huge value, wherever it stands
