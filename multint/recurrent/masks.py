"""The masks that enter a step beside the input: how they are drawn, and how they act."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def locked_mask(like: Tensor, probability: float) -> Tensor:
    """A dropout mask of the given shape, 0 or 1/(1 − p), to be used at every step."""
    return functional.dropout(torch.ones_like(like), probability)


def select(mask: Tensor, new: Any, old: Any) -> Any:
    """The new state in the rows (B,) where the mask holds and the old one elsewhere, in the new one's dtypes."""
    return type(new)(
        *(torch.where(mask.view(-1, *[1] * (n.ndim - 1)), n, o.to(n.dtype)) for n, o in zip(new, old, strict=True))
    )


class StateDropout:
    """A forward pre-hook that multiplies an integrator's z by a mask while there is one.

    The mask meets z inside the step and not the state around it: a GRU's state is also its memory, which must pass
    undropped (Gal and Ghahramani 2016). So a cell passes its state as z, the second stream.

    A hook and not a wrapper around the integrator: so the weights keep their names, and a state dict fits the layer
    without dropout too.
    """

    def __init__(self, features: int) -> None:
        self.features = features  # Z
        self.mask: Tensor | None = None  # (B, Z)

    def __call__(
        self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if self.mask is None:
            return args, kwargs
        if "z" in kwargs:
            return args, kwargs | {"z": kwargs["z"] * self.mask}
        x, z = args
        return (x, z * self.mask), kwargs
