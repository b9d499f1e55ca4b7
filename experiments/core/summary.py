"""The command `summary`: how large a config's network is, without its data and without its memory."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.core.command_line import Invocation
from experiments.core.errors import ExperimentError, building
from experiments.core.model_table import parameter_rows, table
from experiments.core.parsed import Parsed
from experiments.core.parsing import OptionParser
from experiments.core.task import Task


def main(invocation: Invocation) -> None:
    """Print the parameters by part, the multiply-adds, and the bytes that training keeps for the parameters.

    Raises ExperimentError for a config that cannot be built, or one that needs its data to be.
    """
    parser = OptionParser(prog="python -m experiments summary", add_help=False)
    parser.add_argument("--vocabulary_size", type=int, default=None)
    sizes, rest = parser.parse_known_args(invocation.argv[1:])
    if rest in ([], ["-h"], ["--help"]):
        print("usage: python -m experiments summary --config CONFIG [--vocabulary_size V] [the options of fit]")
        return
    commands = Parsed(["fit", *rest], invocation.trusted)
    given = {name: size for name, size in vars(sizes).items() if size is not None}
    for name, size in given.items():
        if size < 1:
            raise ExperimentError(f"--{name}: got {size}, expected at least 1.")
    print(_summary(commands.model, commands.datamodule, given))


def _summary(task: Task, data: Any, sizes: dict[str, int]) -> str:
    with torch.device("meta"), building(f"{type(task).__name__}: the network"):
        task.network = task.build(task.imagined(data, sizes)).eval()
        optimizer = task.configure_optimizers()
    rows = parameter_rows(task.network) | _work(task)
    size = sum(parameter.numel() * parameter.element_size() for parameter in task.network.parameters())
    moments, name = _moments(optimizer), type(optimizer).__name__
    kept = f"parameters {_bytes(size)}, gradients {_bytes(size)}, {name}"
    if moments is None:
        rows["in memory"] = f"{kept}'s own not known"
    else:
        rows["in memory"] = f"{_bytes((2 + moments) * size)}: {kept} {_bytes(moments * size)}"
    return table(rows)


def _work(task: Task) -> dict[str, str]:
    """The multiply-adds of products, forward, for each of what the task counts; nothing where it cannot be called."""
    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            example = task.example()
            counter.flop_counts.clear()
            assert task.network is not None
            task.network(*example.arguments)
    except ExperimentError:
        return {}
    return {
        f"for each of its {task.unit}": f"{counter.get_total_flops() // 2 // example.count:,} multiply-adds forward"
    }


def _moments(optimizer: torch.optim.Optimizer) -> int | None:
    """The numbers that the optimiser keeps of each parameter, seen on one of its own kind.

    None for one that keeps other shapes, as Adafactor does, or does not step by gradients alone, as LBFGS.
    """
    parameter = nn.Parameter(torch.zeros(5, 7))
    small = type(optimizer)([parameter], **optimizer.defaults)
    parameter.grad = torch.ones(5, 7)
    try:
        small.step()
    except (RuntimeError, TypeError):
        return None
    sizes = [value.numel() for value in small.state[parameter].values() if isinstance(value, torch.Tensor)]
    return sizes.count(35) if set(sizes) <= {1, 35} else None


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
