"""The learnt vectors (O,) of an integrator: how one is made, and added to a result."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multint.integrators.checks import number

START = "the number that the vector starts at"


def vector(owner: nn.Module, name: str, initial: float | None, features: int) -> nn.Parameter | None:
    """A learnt vector that starts at `initial` everywhere, or None where the term is left out."""
    if initial is None:
        return None
    number(owner, name, initial, f"{START}, or None to leave it out")
    return nn.Parameter(torch.full((features,), float(initial)))


def required(owner: nn.Module, name: str, initial: float, features: int) -> nn.Parameter:
    """A learnt vector that cannot be left out."""
    number(owner, name, initial, START)
    return nn.Parameter(torch.full((features,), float(initial)))


def add_bias(y: Tensor, bias: nn.Parameter | None) -> Tensor:
    """y + b in y's dtype: under autocast a float32 vector must not promote what the products computed."""
    return y if bias is None else y + bias.to(y.dtype)
