"""One catalogue of everything that a law must hold for. A new integrator or cell is one row here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import multint
from multint import (
    Additive,
    Bilinear,
    Cell,
    Concat,
    Conditional,
    Diagonal,
    Gated,
    GRUCell,
    Hadamard,
    Hypernetwork,
    Integrator,
    LowRank,
    LSTMCell,
    Mogrifier,
    MultiplicativeIntegration,
    RNNCell,
    Swapped,
    Tucker,
)
from multint.cells import HiddenState, SLSTMCell
from multint.integrators import Krause, Normalised, Projected, ScaledOf, SigmoidScale, SumOf, SwappedOf, ThroughOf

Factory = Callable[[int, int, int], Integrator]


class Sizes(NamedTuple):
    x: int
    z: int
    out: int


class Case(NamedTuple):
    build: Factory
    square: bool = False  # O must equal X
    in_cells: bool = True  # whether cells are tested with it, which takes seconds: not where another has its operations

    def __call__(self, sizes: Sizes) -> Integrator:
        return self.build(sizes.x, sizes.z, sizes.x if self.square else sizes.out)


def low_rank(x: int, z: int, o: int) -> Integrator:
    return LowRank(x, z, o, rank=4)


def tucker(x: int, z: int, o: int) -> Integrator:
    return Tucker(x, z, o, x_rank=min(3, x), z_rank=min(2, z))


def x_free(x: int, z: int, o: int) -> Integrator:
    """Of z alone: the outer map of a composition may multiply it with x."""
    f = Additive(x, z, o)
    f.x_projection.weight.requires_grad_(False).zero_()
    return 2**0.5 * f  # half of its variance was x's


def through_x_free(x: int, z: int, o: int) -> Integrator:
    return MultiplicativeIntegration(x, 6, o) @ x_free(x, z, 6)


def bilinear_blocks(x: int, z: int, o: int) -> Integrator:
    """Two blocks of 2 × 3 between others, since the sizes have no divisor in common."""
    return Additive(x, 4, o) @ (Bilinear(x, 6, 4, blocks=2) @ x_free(x, z, 6))


def mixed_sum(x: int, z: int, o: int) -> Integrator:
    return 0.6 * Additive(x, z, o) + 0.8 * Bilinear(x, z, o)


def gated_sum(x: int, z: int, o: int) -> Integrator:
    return 0.7 * Gated(x, z, o) + Hadamard(x, z, o) * 0.7


# Smooth, for derivatives by differences.
conditional = partial(Conditional, hidden=24, activation=torch.tanh)

# The compositions as a config names them.
named_sum = partial(
    SumOf,
    first=partial(ScaledOf, scale=0.6, integrator=Additive),
    second=partial(ScaledOf, scale=0.8, integrator=partial(SwappedOf, integrator=Tucker)),
)
film = partial(ThroughOf, outer=partial(SwappedOf, integrator=Diagonal), inner=LowRank, inner_features="out")

INTEGRATORS: dict[str, Case] = {
    "additive": Case(Additive),
    "additive-unbiased": Case(partial(Additive, bias=None)),
    "concat": Case(Concat),
    "hadamard": Case(Hadamard),
    "hadamard-biased": Case(partial(Hadamard, x_bias=1.0, z_bias=0.5, bias=0.1)),
    "mi": Case(MultiplicativeIntegration),
    "mi-text8": Case(partial(MultiplicativeIntegration, alpha=2.0, beta1=0.5, beta2=0.5), in_cells=False),
    "bilinear": Case(Bilinear),
    "bilinear-alone": Case(partial(Bilinear, z_term=False, x_term=False, bias=None)),
    "bilinear-blocks": Case(bilinear_blocks),
    "low-rank": Case(low_rank),
    "low-rank-mrnn": Case(partial(LowRank, rank=5, z_term=False)),
    "tucker": Case(tucker),
    "diagonal": Case(Diagonal, square=True),
    "gated": Case(Gated),
    "gated-open": Case(partial(Gated, bias=1.5), in_cells=False),
    "sigmoid-scale": Case(SigmoidScale, square=True),
    "sigmoid-scale-low-rank": Case(partial(SigmoidScale, rank=2), square=True),
    "hypernetwork": Case(partial(Hypernetwork, features=6)),
    "hypernetwork-low-rank": Case(partial(Hypernetwork, features=6, head=low_rank)),
    "hypernetwork-diagonal": Case(partial(Hypernetwork, features=6, head=Diagonal), square=True),
    "hypernetwork-linear": Case(partial(Hypernetwork, features=6, network=nn.Linear), in_cells=False),
    "normalised": Case(Normalised),
    "normalised-bilinear": Case(Normalised.of(Bilinear, norm=partial(nn.LayerNorm, elementwise_affine=False))),
    "sum": Case(mixed_sum),
    "sum-gated": Case(gated_sum),
    "through-krause": Case(Krause),
    "through-x-free": Case(through_x_free),
    "swapped": Case(lambda x, z, o: Swapped(low_rank(z, x, o))),
    "named-sum": Case(named_sum, in_cells=False),
    "named-through": Case(partial(ThroughOf, outer=Additive, inner=Hadamard, inner_features=6), in_cells=False),
    "film": Case(film),
    "projected": Case(Projected, in_cells=False),
    "conditional": Case(partial(conditional, integrator=LowRank, residual=True, norm=nn.LayerNorm), in_cells=False),
    "conditional-plain": Case(partial(conditional, integrator=None), in_cells=False),
    "conditional-skip": Case(partial(conditional, integrator=Concat, layers=2), in_cells=False),
    "conditional-film": Case(partial(conditional, integrator=Diagonal), in_cells=False),
}

# In a cell the sizes are the cell's to choose, which leaves out the forms that need O = X.
IN_CELLS: dict[str, Factory] = {
    name: case.build for name, case in INTEGRATORS.items() if case.in_cells and not case.square
}


class LeakyState(NamedTuple):
    h: Tensor  # (B, H)
    slow: Tensor  # (B, H + 2)


class LeakyCell(Cell):
    """A user's own cell, with two states of different widths and weights outside any integrator."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.meet = MultiplicativeIntegration(input_size, hidden_size, hidden_size + 2)
        self.read = nn.Linear(hidden_size + 2, hidden_size)

    def step(self, x: Tensor, state: LeakyState) -> LeakyState:
        slow = 0.9 * state.slow + 0.1 * self.meet(x, state.h).tanh()
        return LeakyState(self.read(slow).tanh(), slow)

    def initial_state(self, batch_size: int) -> LeakyState:
        return LeakyState(self.zeros(batch_size, self.hidden_size), self.zeros(batch_size, self.hidden_size + 2))


class DecayCell(Cell):
    """h' = a(x) ⊙ h + b(x): a diagonal integrator with the streams swapped, the whole step linear in the state."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.decay = Swapped(Diagonal(hidden_size, input_size, hidden_size))

    def step(self, x: Tensor, state: HiddenState) -> HiddenState:
        return HiddenState(0.5 * self.decay(x, state.h))

    def initial_state(self, batch_size: int) -> HiddenState:
        return HiddenState(self.zeros(batch_size, self.hidden_size))


CELLS: dict[str, Callable[[int, int], Cell]] = {
    **{f"rnn-{name}": partial(RNNCell, integrator=f) for name, f in IN_CELLS.items()},
    "rnn-linear": partial(RNNCell, activation=nn.Identity()),
    "rnn-conditional": partial(RNNCell, integrator=partial(conditional, integrator=Diagonal, hidden=6)),
    "rnn-relu-norm": partial(RNNCell, integrator=Normalised, activation=torch.relu),
    **{
        f"lstm-{name}": partial(LSTMCell, integrator=IN_CELLS[name])
        for name in ("additive", "mi", "bilinear", "concat")
    },
    "lstm-peepholes": partial(LSTMCell, peepholes=True, forget_bias=1.0),
    "lstm-projected": partial(LSTMCell, proj_size=3),
    "lstm-norm": partial(LSTMCell, integrator=Normalised, peepholes=True, memory_norm=nn.LayerNorm),
    "lstm-krause": partial(LSTMCell, integrator=Krause),
    **{f"gru-{name}": partial(GRUCell, integrator=IN_CELLS[name]) for name in ("additive", "mi", "low-rank", "gated")},
    "gru-after": partial(GRUCell, reset_after=True),
    "gru-after-additive": partial(GRUCell, integrator=Additive, reset_after=True),
    "gru-norm": partial(GRUCell, integrator=Normalised, reset_after=True),
    "mogrifier": partial(Mogrifier, rounds=3),
    "mogrifier-gru-low-rank": partial(Mogrifier, cell=GRUCell, rounds=2, rank=3),
    "slstm": SLSTMCell,
    "own-leaky": LeakyCell,
    "own-decay": DecayCell,
}

# One cell for each feature that a layer could trip over, for the laws that are crossed with the layers' modes.
TYPICAL = (
    "rnn-mi",
    "rnn-hypernetwork",
    "lstm-bilinear",
    "lstm-projected",
    "lstm-norm",
    "gru-mi",
    "gru-norm",
    "own-leaky",
)

# What `Recurrent` can add to a cell without randomness in evaluation.
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 2},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "zoneout": {"zoneout": 0.3},
}


INPUT_SIZE, HIDDEN_SIZE = 5, 7


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every trainable parameter random values, so that what starts at 0 or 1 matters too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def layer(cell: str, mode: str = "plain", **settings: Any) -> multint.Recurrent:
    """A float64 layer of a catalogued cell with random weights, in evaluation mode."""
    torch.manual_seed(0)  # a hypernetwork measures its network when it is built
    built = multint.Recurrent(INPUT_SIZE, HIDDEN_SIZE, CELLS[cell], **LAYERS[mode], **settings).double()
    return randomise(built).eval()


def normal(*shape: int, seed: int = 1, requires_grad: bool = False) -> Tensor:
    """Reproducible float64 normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def initial_state(rnn: multint.Recurrent, batch_size: int) -> Any:
    """A random state for the layer, in its own form and dtype."""
    x = next(rnn.parameters()).new_zeros(batch_size, 1, rnn.input_size)
    _, state = rnn(x if rnn.batch_first else x.transpose(0, 1))
    if isinstance(state, Tensor):
        return normal(*state.shape, seed=5).to(state)
    return type(state)(*(normal(*field.shape, seed=5 + i).to(field) for i, field in enumerate(state)))
