"""Sets of points with ragged sizes: padded to one length, with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multint.errors import ShapeError


class Points(NamedTuple):
    """B sets of observations y at x. Where sets differ in size, `mask` is true at the points that are there."""

    x: Tensor  # (B, N, X)
    y: Tensor  # (B, N, Y)
    mask: Tensor | None = None  # (B, N) bool; None: all are there

    @property
    def counts(self) -> Tensor:
        """The number of points of each set, (B,)."""
        if self.mask is None:
            return torch.full((len(self.x),), self.x.shape[1], device=self.x.device)
        return self.mask.sum(-1)

    def filled(self) -> Points:
        """The same sets with zeros as padding: whatever stood there, NaN too, reaches no value and no gradient."""
        if self.mask is None:
            return self
        absent = ~self.mask.unsqueeze(-1)
        return Points(self.x.masked_fill(absent, 0), self.y.masked_fill(absent, 0), self.mask)


def padded(
    sets: Sequence[tuple[Tensor, Tensor]],  # of x (N_b, X) and y (N_b, Y)
) -> Points:
    """The sets as one `Points`, with a mask. Raises ShapeError for no sets, and for one of unequal x and y."""
    if not sets:
        raise ShapeError("padded: got no sets, expected at least one")
    for number, (x, y) in enumerate(sets):
        if len(x) != len(y):
            raise ShapeError(f"padded: set {number} has {len(x)} points x and {len(y)} points y, expected as many")
    x, y = (pad_sequence([pair[i] for pair in sets], batch_first=True) for i in range(2))
    counts = torch.tensor([len(x) for x, _ in sets], device=x.device)
    return Points(x, y, torch.arange(x.shape[1], device=x.device) < counts.unsqueeze(-1))


def joined(first: Points, second: Points) -> Points:
    """The union of two sets each. Raises ShapeError where they are not as many, or of other features."""
    check_points("joined", "second", second, first.x.shape[-1], first.y.shape[-1])
    if len(first.x) != len(second.x):
        raise ShapeError(f"joined: {len(first.x)} and {len(second.x)} sets, expected as many")
    x, y = torch.cat([first.x, second.x], 1), torch.cat([first.y, second.y], 1)
    if first.mask is None and second.mask is None:
        return Points(x, y)
    masks = [
        torch.ones(p.x.shape[:2], dtype=torch.bool, device=x.device) if p.mask is None else p.mask
        for p in (first, second)
    ]
    return Points(x, y, torch.cat(masks, 1))


def check_points(
    owner: str,  # whom the message names
    what: str,  # what the points are to it
    points: Points,
    x_features: int,
    y_features: int,
) -> None:
    """Raise a ShapeError unless the points are B sets of these features, with a mask that fits if there is one."""
    if not isinstance(points, Points):
        raise ShapeError(f"{owner}: the {what} are a {type(points).__name__}, expected Points(x, y) or `padded` sets")
    x, y, mask = points
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise ShapeError(
            f"{owner}: the x and y of the {what} are {type(x).__name__} and {type(y).__name__}, expected tensors "
            "(B, N, ·): put ragged sets together by `padded`, which gives a mask"
        )
    check_inputs(owner, f"x of the {what}", x, x_features, "x_features")
    check_inputs(owner, f"y of the {what}", y, y_features, "y_features")
    if x.shape[:2] != y.shape[:2]:
        raise ShapeError(
            f"{owner}: the {what} has x of {tuple(x.shape[:2])} and y of {tuple(y.shape[:2])} (tasks, points), "
            "expected equal ones: ragged sets are padded to one length, with a mask"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ShapeError(f"{owner}: the mask of the {what} is {got}, expected {tuple(x.shape[:2])} torch.bool")


def check_inputs(owner: str, what: str, x: Tensor, features: int, name: str) -> None:
    """Raise a ShapeError unless it is a tensor (B, N, features)."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{owner}: the {what} is a {type(x).__name__}, expected a tensor (B, N, {features})")
    if x.ndim != 3:
        raise ShapeError(f"{owner}: the {what} is {tuple(x.shape)}, expected (B, N, {features})")
    if x.shape[-1] != features:
        raise ShapeError(f"{owner}: the {what} has {x.shape[-1]} features, expected {features} ({name})")
