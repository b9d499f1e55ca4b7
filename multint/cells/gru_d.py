"""The GRU-D: a GRU for series with gaps, whose state and last values decay with the time that went by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multint.cells.base import Cell, HiddenState
from multint.cells.gru import GRUCell
from multint.errors import OptionError, ShapeError
from multint.integrators import Integrator, MultiplicativeIntegration


class GRUDState(NamedTuple):
    """The output, and the last value seen of each variable."""

    h: Tensor  # (B, H)
    last: Tensor  # (B, D)


class GRUDCell(Cell):
    """h' = GRU([v̂; m], γ_h ⊙ h), where v̂ = v for the variables that are seen and γ_v ⊙ last + (1 − γ_v) ⊙ mean else.

    γ_v = exp(−relu(w ⊙ δ + b_v)) and γ_h = exp(−relu(Wδ + b_h)) are decays over the time δ since each was seen. A step
    reads x = [v; m; δ], as `observed` makes it: D values, of which those that are not seen may be anything, NaN too; a
    mask of 1 and 0; and D times. A variable's mean is 0, as data are that were standardised, until `mean` is set.

    Args:
        input_size: 3 D.
        integrator: factory `(X, Z, O) -> Integrator` of the GRU's gates and candidate, with X = 2 D.

    Raises: OptionError for an input_size that is no multiple of 3.
    Source: Che et al. 2018, eqs. 10 to 17; there the update gate is 1 − ours.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
    ) -> None:
        super().__init__(input_size, hidden_size)
        if self.input_size % 3:
            raise OptionError(
                f"GRUDCell: input_size is {input_size}, expected a multiple of 3: values, a mask and times, as "
                "multint.cells.observed joins them"
            )
        self.variables = input_size // 3
        self.cell = GRUCell(2 * self.variables, hidden_size, integrator)
        self.state_decay = nn.Linear(self.variables, hidden_size)
        self.value_decay = nn.Parameter(torch.ones(self.variables))
        self.value_bias = nn.Parameter(torch.zeros(self.variables))
        self.register_buffer("mean", torch.zeros(self.variables))
        self.mean: Tensor

    def step(
        self,
        x: Tensor,  # (B, 3 D)
        state: GRUDState,
    ) -> GRUDState:
        v, m, elapsed = x.chunk(3, -1)
        last = torch.where(m > 0, v, state.last)
        kept = (-torch.relu(self.value_decay * elapsed + self.value_bias)).exp()
        guessed = self.mean + kept * (state.last - self.mean)
        known = torch.where(m > 0, v, guessed)
        h = (-torch.relu(self.state_decay(elapsed))).exp() * state.h
        new = self.cell.step(torch.cat([known, m], -1), HiddenState(h))
        return GRUDState(new.h, last)

    def initial_state(self, batch_size: int) -> GRUDState:
        """Zeros, and each variable's mean as its last value."""
        return GRUDState(self.zeros(batch_size, self.hidden_size), self.mean.expand(batch_size, -1).clone())


def observed(
    values: Tensor,  # (T, B, D) or (T, D); NaN where nothing was seen
    times: Tensor,  # (T,), (T, B), in order
) -> Tensor:  # (..., 3 D)
    """What `GRUDCell` reads, [v; m; δ]: the values, 0 where they are NaN; whether they were seen; and since when not.

    δ_t = t − t₋₁, and δ_{t−1} more for a variable that was not seen at t₋₁; 0 at the first step.

    Raises: ShapeError for times that do not fit, or fall.
    """
    if times.shape not in (values.shape[:1], values.shape[:-1]) or values.ndim not in (2, 3):
        raise ShapeError(
            f"observed: values {tuple(values.shape)} and times {tuple(times.shape)}, expected (T, B, D) or (T, D), and "
            "(T, B) or (T,)"
        )
    steps = times.diff(dim=0).to(values)
    if bool((steps < 0).any()):
        raise ShapeError("observed: the times fall, expected each at or after the one before")
    is_seen = ~values.isnan()
    elapsed = [torch.zeros_like(values[0])]
    for step, was_seen in zip(steps, is_seen[:-1], strict=True):
        elapsed.append(step.unsqueeze(-1) + torch.where(was_seen, 0, elapsed[-1]))
    return torch.cat([values.nan_to_num(nan=0.0), is_seen.to(values), torch.stack(elapsed)], -1)
