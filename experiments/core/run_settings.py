"""Every setting of a run: what a config and options say, and the task and the data that they mean."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
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
from multint import MultintError

register_unresolvable_import_paths(torch)  # functions such as torch.relu do not say where they are

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
        self._built: Namespace | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """Every setting, given or not, as plain values."""
        return yaml.safe_load(self.text(self.config))

    def text(self, config: Namespace) -> str:
        """A config as YAML, every setting in it."""
        return self._parser.dump(config, skip_unset=False, skip_validation=True, skip_link_targets=False)

    @property
    def built(self) -> Namespace:
        """The config with its classes built, once."""
        if self._built is None:
            with building("the classes of the config"), _explained(self._parser, self._argv):
                self._built = self._parser.instantiate(self.config)
            self._built.model.settings = _saved(self.plain["model"])
        return self._built

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


def built_task(spec: dict[str, Any]) -> Task:
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


@cache
def _parser(command: str, trainer: type | None) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
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
    with _explained(parser, argv):
        config = parser.parse_args(argv)
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
