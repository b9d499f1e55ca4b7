"""The command `export`: a checkpoint's network as weights, or as a program that runs without this project."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import nn

from experiments.core.checkpoints import checkpoint_in, load_task, read_checkpoint
from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, replacing, write_text
from experiments.core.export.programs import trace, write_onnx, write_program
from experiments.core.export.weights import settings_path, write_weights
from experiments.core.task import Example


class _Exported(NamedTuple):
    """What is exported."""

    network: nn.Module
    example: Example | None  # None where the task knows none, and the format needs none
    settings: dict[str, Any]  # the network's class_path and init_args, the sizes that the data decided among them
    data: dict[str, Any]  # what users of the network need of the data, such as its vocabulary, as plain values


class _Format(NamedTuple):
    """A kind of file: how it is written, its suffix, and the libraries that it needs beside torch."""

    write: Callable[[_Exported, Path], None]
    suffix: str
    libraries: tuple[str, ...]


def _weights(given: _Exported, path: Path) -> None:
    write_weights(given.network, path)


def _program(given: _Exported, path: Path) -> None:
    assert given.example is not None
    write_program(trace(given.network, given.example), path)


def _onnx(given: _Exported, path: Path) -> None:
    assert given.example is not None
    write_onnx(trace(given.network, given.example), given.example, path)


FORMATS = {
    "safetensors": _Format(_weights, ".safetensors", ("safetensors",)),
    "torch_export": _Format(_program, ".pt2", ()),
    "onnx": _Format(_onnx, ".onnx", ("onnx", "onnxscript")),
}


def main(invocation: Invocation) -> None:
    """Write the file, its settings beside it, and say what is in it.

    Raises ExperimentError for a file that is no checkpoint, a missing library, a network that the format cannot hold,
    and a path that cannot be written.
    """
    options = _parser().parse_args(invocation.argv[1:])
    kind = FORMATS[options.format]
    _check_libraries(options.format, kind)
    checkpoint = checkpoint_in(options.checkpoint)
    path = options.output or checkpoint.with_suffix(kind.suffix)
    if not path.parent.is_dir():
        raise ExperimentError(f"{path}: cannot be written: there is no folder {path.parent}")
    if path.suffix != kind.suffix:
        raise ExperimentError(f"{path}: expected a name that ends with {kind.suffix}.")
    given = _of(checkpoint, needs_example=options.format != "safetensors")
    for written in (path, settings_path(path)):
        if written.exists() and written.samefile(checkpoint):
            raise ExperimentError(f"{written}: this is the checkpoint itself, expected another --output.")
    with replacing(path) as aside:
        kind.write(given, aside)
    write_text(settings_path(path), _settings(given))
    print(_summary(given, options.format, path))


def _of(checkpoint: Path, needs_example: bool) -> _Exported:
    task = load_task(checkpoint)
    assert task.network is not None
    network = task.network.eval()
    for name, value in network.state_dict().items():
        if not value.isfinite().all():
            raise ExperimentError(
                f"{checkpoint}: {name} is not finite: the training has diverged. Give a checkpoint from before."
            )
    settings = read_checkpoint(checkpoint)["hyper_parameters"].get("network")
    if not isinstance(settings, dict):
        raise ExperimentError(f"{checkpoint}: the settings of a {type(task).__name__} name no network to rebuild.")
    settings = {"class_path": settings["class_path"], "init_args": task.sizes() | settings.get("init_args", {})}
    return _Exported(network, task.example() if needs_example else None, settings, task.description)


def _check_libraries(name: str, kind: _Format) -> None:
    for library in kind.libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ExperimentError(
                f'export --format {name} needs {library}: pip install -c constraints.txt -e ".[export]"'
            ) from error


def _settings(given: _Exported) -> str:
    values = {"network": given.settings, **given.data}
    if given.example is not None:
        inputs = {name: list(shape) for name, shape in given.example.shapes().items()}
        values |= {"inputs": inputs, "outputs": list(given.example.outputs)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _summary(given: _Exported, name: str, path: Path) -> str:
    if given.example is None:
        count = sum(parameter.numel() for parameter in given.network.parameters())
        contents = f"{count:,} parameters"
    else:
        inputs = [f"{name} ({', '.join(map(str, shape))})" for name, shape in given.example.shapes().items()]
        contents = f"{', '.join(inputs)} -> {', '.join(given.example.outputs)}"
    return f"{path}: {contents}\n{settings_path(path)}: the network's settings, and {', '.join(given.data)}"


def _parser() -> OptionParser:
    parser = OptionParser(prog="python -m experiments export", description="A checkpoint's network in other forms.")
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="safetensors: weights, for load_network; torch_export, onnx: a program of free batch size and length",
    )
    parser.add_argument("--output", type=Path, default=None, metavar="PATH", help="the file (beside the checkpoint)")
    return parser
