"""Training in several processes: what they must agree on, and what only one of them knows."""

from typing import Any

import torch.distributed
from torch import Tensor


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank: a list of this one alone where there is one."""
    if not _are_several():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def summed(value: Tensor) -> Tensor:
    """The sum of all processes' values, without a gradient."""
    value = value.detach().clone()  # the exchange writes into it
    if _are_several():
        torch.distributed.all_reduce(value)
    return value


def averaged(value: Tensor) -> Tensor:
    """The mean of all processes' values, without a gradient."""
    return summed(value) / (torch.distributed.get_world_size() if _are_several() else 1)


def rank() -> int:
    """This process's number among those that train together, from 0."""
    return torch.distributed.get_rank() if _are_several() else 0


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
