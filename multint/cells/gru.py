"""The gated recurrent unit with any integrator, its reset before or after the product."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from multint.cells.base import Cell, HiddenState
from multint.errors import OptionError
from multint.integrators import Integrator, MultiplicativeIntegration, RecurrentBatchNorm
from multint.integrators.base import build
from multint.integrators.checks import flag
from multint.integrators.vectors import vector


class GRUCell(Cell):
    """h' = (1 − z) ⊙ n + z ⊙ h, where (r, z) = σ(gates(x, h)) and n is the candidate's tanh.

    Reset before the product: n = tanh(f(x, r ⊙ h)).
    Reset after it: n = tanh(f(x, 0) + r ⊙ (f(x, h) − f(x, 0) + b_r)), so that r scales all that the state contributes.
    With `Additive` that is `nn.GRUCell`; with `MultiplicativeIntegration` it puts r ⊙ Uh in Uh's place.
    The update gate z keeps the old state, as PyTorch's does: Wu's z is 1 − ours.

    Args:
        integrator: factory `(X, H, O) -> Integrator`, used for the gates (O = 2H) and for the candidate f (O = H).
        reset_after: apply the reset after the product.
        recurrent_bias: what b_r starts at; None leaves it out. Only the reset after the product has it.

    Raises: OptionError for a candidate with `RecurrentBatchNorm` whose reset comes after the product: f(x, 0) is no
    step of the data's.
    Source: Wu et al. 2016, A.2 (before); Cho et al. 2014 as in `nn.GRU` (after).
    """

    gate_names = ("r", "z")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        integrator: Callable[[int, int, int], Integrator] = MultiplicativeIntegration,
        reset_after: bool = False,
        recurrent_bias: float | None = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.gates = build(self, "integrator", integrator, input_size, hidden_size, len(self.gate_names) * hidden_size)
        self.candidate = build(self, "integrator", integrator, input_size, hidden_size, hidden_size)
        self.reset_after = flag(self, "reset_after", reset_after)
        if reset_after and any(isinstance(part, RecurrentBatchNorm) for part in self.candidate.modules()):
            raise OptionError(
                "GRUCell: reset_after is True and the integrator has RecurrentBatchNorm, which has no statistics of "
                "f(x, 0); expected reset_after=False"
            )
        self.recurrent_bias = vector(self, "recurrent_bias", recurrent_bias, hidden_size) if reset_after else None

    def step(
        self,
        x: Tensor,  # (B, X)
        state: HiddenState,
    ) -> HiddenState:
        h = state.h
        r, z = self.gates(x, h).sigmoid().chunk(len(self.gate_names), -1)
        n = (self._candidate_after(x, h, r) if self.reset_after else self.candidate(x, r * h)).tanh()
        return HiddenState((n + z * (h - n)).to(n.dtype))

    def _candidate_after(self, x: Tensor, h: Tensor, r: Tensor) -> Tensor:
        without_state = self.candidate(x, h.new_zeros(self.hidden_size))
        contribution = self.candidate(x, h) - without_state
        if self.recurrent_bias is not None:
            contribution = contribution + self.recurrent_bias.to(r.dtype)
        return without_state + r * contribution

    def initial_state(self, batch_size: int) -> HiddenState:
        return HiddenState(self.zeros(batch_size, self.hidden_size))
