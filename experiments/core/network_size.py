"""How large a network is, layer by layer, and whether it fits into this machine, before it is built."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from experiments.core.errors import ExperimentError

# Each costs milliseconds to build, and a layer's calls in every step. Trained networks have hundreds.
_MOST_TENSORS = 5_000


class Layer(NamedTuple):
    """A part of a network that has parameters."""

    name: str  # its path in the network
    depth: int  # 0 for a part of the network itself
    module: nn.Module
    parameters: int  # with those of its parts; one that two layers share is counted with the first


def layers(network: nn.Module, depth: int = 4) -> Iterator[Layer]:
    """The parts of a network, each before its own parts, so many levels deep; lists of modules are no level."""
    owners: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), name)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters(remove_duplicate=False)}
    counted = {name: sizes[name] for name in owners.values()}

    def below(module: nn.Module, path: str, level: int) -> Iterator[Layer]:
        for name, child in module.named_children():
            inside = sum(size for of, size in counted.items() if of.startswith(f"{path}{name}."))
            if not inside:
                continue
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                yield from below(child, f"{path}{name}.", level)
                continue
            yield Layer(f"{path}{name}", level, child, inside)
            if level + 1 < depth:
                yield from below(child, f"{path}{name}.", level + 1)

    return below(network, "", 0)


def layer_table(network: nn.Module, columns: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The layers as text: names, classes and parameters, and further columns, each by the layers' names."""
    columns = columns or {}
    rows = [["layer", "class", *columns, "parameters"]]
    above: list[Layer] = []
    for layer in layers(network):
        above[layer.depth :] = [layer]
        shown = layer.name.removeprefix(f"{above[-2].name}.") if len(above) > 1 else layer.name
        further = [column.get(layer.name, "") for column in columns.values()]
        rows.append(["  " * layer.depth + shown, type(layer.module).__name__, *further, f"{layer.parameters:,}"])
    total = sum(parameter.numel() for parameter in network.parameters())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_text = (
        [True, True, *(not value[:1].isdigit() for value in rows[1][2:])] if len(rows) > 1 else [True] * len(widths)
    )
    lines = []
    for row in rows:
        aligned = zip(row, widths, is_text, strict=True)
        lines.append("  ".join(f"{cell:<{width}}" if left else f"{cell:>{width}}" for cell, width, left in aligned))
    return "\n".join([*map(str.rstrip, lines), f"in all  {total:,} parameters"])


def table(rows: dict[str, str]) -> str:
    """The rows as text."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


@contextmanager
def without_memory() -> Iterator[None]:
    """What is built within has shapes and no values."""
    with torch.device("meta"), _NoRandomValues():
        yield


class _NoRandomValues(TorchFunctionMode):
    """Lets no random values be drawn. There, torch would import its whole compiler for them, which takes a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Those of torch.nn.init and of tensors, which the others draw by.
        is_drawn = getattr(function, "__name__", "") in ("normal_", "uniform_")
        given = kwargs or {}
        return (args[0] if args else given["tensor"]) if is_drawn else function(*args, **given)


class _TooLargeError(ExperimentError):
    pass


def refuse_beyond_memory(build: Callable[[], nn.Module]) -> None:
    """Raises ExperimentError where the network's parameters and their gradients exceed the machine's memory.

    It is built without memory first, on the meta device, no further than it takes to see that it is too large. Where
    that fails nothing is refused, since building it in earnest will say why; but for sizes that no number of bytes can
    express.
    """
    seen = _Seen()
    hook = register_module_parameter_registration_hook(seen.register)
    try:
        with torch.random.fork_rng(devices=[]), without_memory():
            parameters = list(build().parameters())
    except _TooLargeError:
        raise
    except RuntimeError as error:
        if "overflow" in str(error):
            reason = str(error).partition("\n")[0]
            raise ExperimentError(f"its sizes are beyond any memory ({reason}). Lower them.") from error
        return
    except Exception:
        return
    finally:
        hook.remove()
    count = sum(parameter.numel() for parameter in parameters)
    needed = 2 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if needed > _memory():
        raise _too_large(f"{count:,}", needed)


class _Seen:
    """The parameters of a network that is being built."""

    def __init__(self) -> None:
        self._parameters: dict[int, nn.Parameter] = {}  # by their ids, which are kept from being used again
        self._count = self._needed = 0

    def register(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or id(parameter) in self._parameters:
            return
        self._parameters[id(parameter)] = parameter
        self._count += parameter.numel()
        self._needed += 2 * parameter.numel() * parameter.element_size()
        if len(self._parameters) > _MOST_TENSORS:
            raise _TooLargeError(
                f"the network has more than {_MOST_TENSORS:,} parameter tensors. Lower its number of layers."
            )
        if self._needed > 2 * _memory():  # by far: some of them may be replaced before it is whole
            raise _too_large(f"more than {self._count:,}", self._needed)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _too_large(count: str, needed: int) -> _TooLargeError:
    return _TooLargeError(
        f"the network has {count} parameters, {needed / 2**30:,.0f} GiB with their gradients, and this machine "
        f"{_memory() / 2**30:,.0f} GiB of memory. Lower its sizes."
    )
