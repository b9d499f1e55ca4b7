"""The `lstm` of GradBench: two layers whose weights are all diagonal, over one text, in float64.

Many ways to differentiate have entered it: https://github.com/gradbench/gradbench (evals/lstm, after ADBench).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.bench import by_jax
from experiments.bench.case import Case
from multint import Cell, scan

LAYERS = 2


class DiagonalState(NamedTuple):
    """The upper layer's output, the lower one's, and both memories."""

    h: Tensor  # (B, H)
    lower: Tensor  # (B, H)
    c: Tensor  # (B, H)
    lower_c: Tensor  # (B, H)


class DiagonalLSTM(Cell):
    """Two layers of c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g), h' = σ(o) ⊙ tanh(c'), where f and o are of x, i and g of h.

    Each is w ⊙ x + b or w ⊙ h + b. The lower one's h' is the upper one's x; the lower one reads s ⊙ x with a learnt s.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.weights = nn.Parameter(torch.randn(LAYERS, 4, size) / 2)  # of f, i, o and g
        self.biases = nn.Parameter(torch.randn(LAYERS, 4, size) / 2)
        self.scale = nn.Parameter(torch.randn(size))  # s

    def step(self, x: Tensor, state: DiagonalState) -> DiagonalState:
        lower, lower_c = self._layer(0, x * self.scale, state.lower, state.lower_c)
        h, c = self._layer(1, lower, state.h, state.c)
        return DiagonalState(h, lower, c, lower_c)

    def _layer(self, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        (w_f, w_i, w_o, w_g), (b_f, b_i, b_o, b_g) = self.weights[layer], self.biases[layer]
        c = (x * w_f + b_f).sigmoid() * c + (h * w_i + b_i).sigmoid() * (h * w_g + b_g).tanh()
        return (x * w_o + b_o).sigmoid() * c.tanh(), c

    def initial_state(self, batch_size: int) -> DiagonalState:
        return DiagonalState(*(self.zeros(batch_size, self.hidden_size) for _ in range(4)))


@dataclass(frozen=True)
class GradBenchCase(Case):
    """The loss over a text of T + 1 characters of X bits, and with `backward` its gradient by all weights."""

    dtype: torch.dtype = torch.float64

    @property
    def rivals(self) -> list[str]:
        return ["loop"] + ["jax"] * self.has_jax

    @property
    def told(self) -> list[str]:
        return []

    def arguments(self) -> list[Tensor]:
        """The text's bits, the first state, and the output's weights."""
        torch.manual_seed(0)
        steps, rows, bits, _ = self.size
        text = torch.randint(2, (steps + 1, rows, bits)).double()
        state = torch.randn(4, rows, bits, dtype=torch.float64)
        output = torch.randn(2, bits, dtype=torch.float64, requires_grad=self.backward)
        return [text, state, output]

    def build(self, contender: str) -> Callable[[], list[Tensor]]:
        text, state, output = self.arguments()
        cell = DiagonalLSTM(self.size[2]).double()
        if contender == "jax":
            return by_jax.gradbench(cell, text, state, output, self.backward)
        engine: Any = "fused" if contender == "ours" else "loop"

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(self.backward):
                h, _ = scan(cell, text[:-1], DiagonalState(*state), engine=engine)
                loss = loss_of(h * output[0] + output[1], text[1:])
                return [loss, *torch.autograd.grad(loss, [*cell.parameters(), output])] if self.backward else [loss]

        return run


def loss_of(y: Tensor, expected: Tensor) -> Tensor:
    """−mean of the expected bits ⊙ (y − log(2 + Σ eʸ)), the sum over a character's bits."""
    return -(expected * (y - (2 + y.exp().sum(-1, keepdim=True)).log())).mean()


def gradbench_cases() -> list[Case]:
    """The text of 1024 characters that is published, its objective alone and its gradient."""
    size = (1023, 1, 14, 14)
    return [
        GradBenchCase("gradbench-lstm", size, nn.Identity, jax="gradbench", at_least_loop=150.0),
        GradBenchCase("gradbench-lstm-objective", size, nn.Identity, jax="gradbench", backward=False),
    ]
