"""Hidden Markov models: their forward algorithm is a recurrent cell with multiplicative integration."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from multint import Cell, Hadamard, scan
from multint.errors import OptionError, ShapeError

_ROUNDING = 1e-4  # by which the sum of a distribution in float32 may miss 1


class ForwardState(NamedTuple):
    """What is known of the hidden state, and of the symbols, after a step."""

    posterior: Tensor  # (B, S): Pr[h_t | x_1 … x_t]
    log_likelihood: Tensor  # (B,): log Pr[x_1 … x_t]


class ForwardCell(Cell):
    """a = Wx ⊙ Uh, h' = a / Σ a, and log Σ a is added up: eq. 2 of Wu et al. with U[i, j] = Pr[h' = i | h = j].

    Without the division a alone is the forward algorithm, and underflows after some hundred symbols.
    """

    def __init__(self, symbols: int, states: int) -> None:
        super().__init__(symbols, states)
        self.integrator = Hadamard(symbols, states, states, bias=None)

    def step(
        self,
        x: Tensor,  # (B, K), one-hot
        state: ForwardState,
    ) -> ForwardState:
        return self.seen(self.integrator(x, state.posterior), state.log_likelihood)

    def initial_state(self, batch_size: int) -> ForwardState:
        """Equal probabilities; a model that knows its first state's starts after the first symbol instead."""
        return self.seen(self.zeros(batch_size, self.hidden_size) + 1 / self.hidden_size, self.zeros(batch_size))

    @staticmethod
    def seen(
        joint: Tensor,  # (B, S): Pr[h_t, x_t | x_1 … x_{t−1}]
        log_likelihood: Tensor | float,  # (B,): log Pr[x_1 … x_{t−1}]
    ) -> ForwardState:
        """The state after a symbol."""
        scale = joint.sum(-1)
        # Where the symbol was impossible, the posterior is 0 from there on, and no gradient flows: log 0 has none.
        possible = scale > 0
        divisor = torch.where(possible, scale, 1)
        of_symbol = torch.where(possible, divisor.log(), -torch.inf)
        return ForwardState(joint / divisor.unsqueeze(-1), log_likelihood + of_symbol)


class Filtered(NamedTuple):
    """What a model makes of sequences."""

    log_likelihood: Tensor  # (B,)
    posteriors: Tensor  # (T, B, S)


class HiddenMarkovModel(nn.Module):
    """Pr[x, h] = start[h_1] · Π_{t>1} transition[h_{t−1}, h_t] · Π_t emission[h_t, x_t], and Pr[x] is its sum over h.

    It is run by `scan`, scaled at every step, so that the log-likelihood is finite at any length; it is −∞ for a
    sequence that is impossible. Its three tables are parameters. The gradient with respect to each takes its numbers
    for free, not bound to sum to 1: a number times its gradient of the log-likelihood is how often the model expects to
    have used it, and these counts, normalised, are the tables after one step of Baum and Welch.

    The trap in Wu et al., section 4.1: an MI-RNN that starts from h_0 = start gives another likelihood, since the first
    step would carry it through the transition. h_0 would be the distribution one step before the first symbol, which
    need not exist. Here the first step has start in Uh_0's place.

    Args:
        start: Pr[h_1 = i], (S,).
        transition: transition[i, j] = Pr[h' = j | h = i], (S, S): rows sum to 1.
        emission: emission[i, k] = Pr[x = k | h = i], (S, K): rows sum to 1.

    Raises: ShapeError for shapes that do not fit; OptionError for what is no distribution.
    Source: Wu et al. 2016, section 4.1; Rabiner 1989 for the scaling.
    """

    def __init__(
        self,
        start: Tensor,  # (S,)
        transition: Tensor,  # (S, S)
        emission: Tensor,  # (S, K)
    ) -> None:
        super().__init__()
        tables = {"start": start, "transition": transition, "emission": emission}
        given = {name: torch.as_tensor(table).detach() for name, table in tables.items()}
        _check(given)
        states, symbols = given["emission"].shape
        self.start = nn.Parameter(given["start"].clone())
        self.cell = ForwardCell(symbols, states)
        W, U = self.cell.integrator.x_projection, self.cell.integrator.z_projection
        W.weight, U.weight = nn.Parameter(given["emission"].clone()), nn.Parameter(given["transition"].T.clone())
        # So that the parameter, and its gradient, is the table and not its transpose.
        parametrize.register_parametrization(U, "weight", _Transposed())

    @property
    def transition(self) -> nn.Parameter:  # (S, S)
        """Pr[h' = j | h = i]: the cell's U is its transpose."""
        parametrizations: Any = self.cell.integrator.z_projection.parametrizations
        return parametrizations.weight.original

    @property
    def emission(self) -> nn.Parameter:  # (S, K)
        """Pr[x = k | h = i]: the cell's W."""
        return self.cell.integrator.x_projection.weight

    def forward(
        self,
        symbols: Tensor,  # (T, B), integers from 0 to K−1
    ) -> Filtered:
        """The log-likelihood of every sequence, and Pr[h_t | x_1 … x_t] after every symbol.

        Raises: ShapeError for symbols of another shape; OptionError for others than 0 … K−1.
        """
        self._check_symbols(symbols)
        state = self.cell.seen(self.start * self.emission.T[symbols[0].long()], 0.0)
        first = state.posterior.unsqueeze(0)
        if len(symbols) == 1:
            return Filtered(state.log_likelihood, first)
        xs = nn.functional.one_hot(symbols[1:].long(), self.cell.input_size).to(first.dtype)
        posteriors, final = scan(self.cell, xs, state)
        return Filtered(final.log_likelihood, torch.cat([first, posteriors]))

    def log_likelihood(
        self,
        symbols: Tensor,  # (T, B), integers from 0 to K−1
    ) -> Tensor:  # (B,)
        """log Pr[x_1 … x_T] of every sequence, in nats; see `forward`."""
        return self(symbols).log_likelihood

    def extra_repr(self) -> str:
        return f"{self.cell.hidden_size} states, {self.cell.input_size} symbols"

    def _check_symbols(self, symbols: Any) -> None:
        if not isinstance(symbols, Tensor) or symbols.ndim != 2 or 0 in symbols.shape:
            got = f"the shape {tuple(symbols.shape)}" if isinstance(symbols, Tensor) else f"a {type(symbols).__name__}"
            raise ShapeError(
                f"HiddenMarkovModel: symbols: got {got}, expected (T, B), T steps of B sequences; one alone is (T, 1)"
            )
        if symbols.is_floating_point() or symbols.is_complex() or symbols.dtype == torch.bool:
            raise OptionError(f"HiddenMarkovModel: symbols are {symbols.dtype}, expected whole numbers")
        low, high, last = int(symbols.min()), int(symbols.max()), self.cell.input_size - 1
        if low < 0 or high > last:
            raise OptionError(f"HiddenMarkovModel: symbols are from {low} to {high}, expected from 0 to {last}")


class _Transposed(nn.Module):
    """A matrix by its transpose."""

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.T

    right_inverse = forward


def _check(tables: dict[str, Tensor]) -> None:
    """Raise unless the tables are distributions over states, next states and symbols."""
    states = len(tables["start"]) if tables["start"].ndim == 1 else None
    expected = {"start": "(S,)", "transition": "(S, S)", "emission": "(S, K)"}
    for name, table in tables.items():
        shape = tuple(table.shape)
        fits = table.ndim == (1 if name == "start" else 2) and 0 not in shape and shape[0] == states
        if not fits or (name == "transition" and shape[1] != states):
            where = "" if states is None else f" with S = {states}, as start has it"
            raise ShapeError(f"HiddenMarkovModel: {name} has the shape {shape}, expected {expected[name]}{where}")
        if not table.is_floating_point() or table.dtype != tables["start"].dtype:
            raise OptionError(
                f"HiddenMarkovModel: {name} is {table.dtype}, expected floating-point numbers, all of one dtype"
            )
        if not bool((table >= 0).all()):
            raise OptionError(f"HiddenMarkovModel: {name} has {float(table.min())}, expected probabilities")
        total = table.sum(-1).flatten()
        worst = int((total - 1).abs().argmax())
        if abs(float(total[worst]) - 1) > _ROUNDING:
            row = "" if name == "start" else f"row {worst} of "
            hint = ": it seems to be transposed" if _columns_sum_to_one(table) else ""
            raise OptionError(f"HiddenMarkovModel: {row}{name} sums to {float(total[worst]):.6g}, expected 1{hint}")


def _columns_sum_to_one(table: Tensor) -> bool:
    return table.ndim == 2 and bool(((table.sum(0) - 1).abs() <= _ROUNDING).all())
