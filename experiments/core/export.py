"""The command `export`: a checkpoint's network as weights, or as a program that runs without this project."""

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, building, replacing, write_text
from experiments.core.loading import checkpoint_in, load_task, read_checkpoint
from experiments.core.task import Example
from experiments.core.trust import trusting
from multint import MultintError


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


def settings_path(path: Path) -> Path:
    """Where the settings of an exported file lie: beside it, with `.yaml` after its whole name."""
    return path.with_name(path.name + ".yaml")


def load_network(
    path: str | Path,
    trust: Sequence[str] = (),
) -> nn.Module:
    """The network that `export --format safetensors` wrote, in evaluation mode, on the CPU.

    Args:
        path: the file of the weights, with its settings beside it.
        trust: modules of your own whose classes the settings may name; see `experiments.core.trust`.

    Raises: ExperimentError where a file is missing or damaged, or the two do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    path = Path(path)
    try:
        settings = yaml.safe_load(settings_path(path).read_text(encoding="utf-8"))["network"]
        network = _build(settings, trust)
        load_model(network, path)
    except (OSError, yaml.YAMLError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ExperimentError(f"{path}: no network that `export` wrote with its settings beside it: {error}") from error
    return network.eval()


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


def trace(network: nn.Module, example: Example) -> ExportedProgram:
    """The network's program, free in the axes that the example names.

    Raises: ExperimentError for a network that cannot be traced.
    """
    tensors, form = pytree.tree_flatten(example.arguments)
    free = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in example.inputs.values())
    with _told("torch.export"):
        whole = _OfTensors(network, form).eval().requires_grad_(False)
        given = tuple(tensor.detach() for tensor in tensors)
        return torch.export.export(whole, given, dynamic_shapes=(free,))


def _write_weights(given: _Exported, path: Path) -> None:
    """Write the network's parameters and buffers by their names; a tensor with several names once.

    Raises: OSError where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        save_model(given.network, str(path))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _write_program(given: _Exported, path: Path) -> None:
    """Write the program for `torch.export.load(path).module()`, which takes the inputs in order."""
    assert given.example is not None
    content = io.BytesIO()  # whose failures to be written are not torch's errors
    torch.export.save(trace(given.network, given.example), content)
    path.write_bytes(content.getvalue())


def _write_onnx(given: _Exported, path: Path) -> None:
    """Write the program in ONNX, with the example's names.

    Raises: ExperimentError for an operation that ONNX does not have.
    """
    example = given.example
    assert example is not None
    program = trace(given.network, example)
    with _told("ONNX"):
        translated = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(example.inputs),
            output_names=list(example.outputs),
            dynamic_shapes=(tuple(dict(axes) for axes in example.inputs.values()),),
        )
        assert translated is not None
    translated.save(path)


class _OfTensors(nn.Module):
    """The network as a function of tensors alone: where a program runs, nobody knows the classes of states."""

    def __init__(self, network: nn.Module, form: pytree.TreeSpec) -> None:
        super().__init__()
        self.network = network
        self.form = form  # of the arguments

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(self.network(*pytree.tree_unflatten(tensors, self.form))))


def _build(settings: dict[str, Any], trust: Sequence[str]) -> nn.Module:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    with trusting(trust), building("the network"):
        network: nn.Module = parser.instantiate(parser.parse_object({"network": settings})).network
    return network


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Makes one ExperimentError of whatever torch's exporter raises within, and silences it meanwhile.

    It logs its errors, which become the message, and optional libraries that are not there; it warns of what it does
    itself, and that an axis which has one name for two inputs has it.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise ExperimentError(f"{what} cannot hold this network: {_reason(error)}") from error
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """This project's own message, wherever in the chain of causes it stands; else the first line of the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MultintError):
            return str(cause)
        cause = cause.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


FORMATS = {
    "safetensors": _Format(_write_weights, ".safetensors", ("safetensors",)),
    "torch_export": _Format(_write_program, ".pt2", ()),
    "onnx": _Format(_write_onnx, ".onnx", ("onnx", "onnxscript")),
}
