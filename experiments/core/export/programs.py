"""A network as a program of tensors alone, which runs without this project: torch.export's, and ONNX."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from experiments.core.errors import ExperimentError
from experiments.core.task import Example
from multint import MultintError


class _OfTensors(nn.Module):
    """The network as a function of tensors alone: where a program runs, nobody knows the classes of states."""

    def __init__(self, network: nn.Module, form: pytree.TreeSpec) -> None:
        super().__init__()
        self.network = network
        self.form = form  # of the arguments

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(self.network(*pytree.tree_unflatten(tensors, self.form))))


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


def write_program(program: ExportedProgram, path: Path) -> None:
    """Write the program for `torch.export.load(path).module()`, which takes the inputs in order."""
    content = io.BytesIO()  # whose failures to be written are not torch's errors
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())


def write_onnx(program: ExportedProgram, example: Example, path: Path) -> None:
    """Write the program in ONNX, with the example's names.

    Raises: ExperimentError for an operation that ONNX does not have.
    """
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
