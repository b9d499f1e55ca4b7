"""Whether a network fits into this machine, found out before it is built."""

import os
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from experiments.core.errors import ExperimentError

# Each costs milliseconds to build, and a layer's calls in every step. Trained networks have hundreds.
_MOST_TENSORS = 5_000


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
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
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
