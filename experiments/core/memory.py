"""Whether a network fits into this machine, found out before it is built."""

import os
from collections.abc import Callable

import torch
from torch import nn

from experiments.core.errors import ExperimentError


def refuse_beyond_memory(build: Callable[[], nn.Module]) -> None:
    """Raises ExperimentError where the network's parameters and their gradients exceed the machine's memory.

    It is built without memory first, on the meta device. Where that fails nothing is refused, since building it in
    earnest will say why; but for sizes that no number of bytes can express.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            parameters = list(build().parameters())
    except RuntimeError as error:
        if "overflow" in str(error):
            reason = str(error).partition("\n")[0]
            raise ExperimentError(f"its sizes are beyond any memory ({reason}). Lower them.") from error
        return
    except Exception:
        return
    count = sum(parameter.numel() for parameter in parameters)
    needed = 2 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ExperimentError(
            f"the network has {count:,} parameters, {needed / 2**30:,.0f} GiB with their gradients, and this machine "
            f"{memory / 2**30:,.0f} GiB of memory. Lower its sizes."
        )
