"""Training in several processes: what they must agree on, and what only one of them knows."""

from typing import Any

import torch.distributed
from torch import Tensor


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank: a list of this one alone where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def averaged(value: Tensor) -> Tensor:
    """The mean of all processes' values, without a gradient."""
    value = value.detach().clone()  # the exchange writes into it
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def rank() -> int:
    """This process's number among those that train together, from 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0
