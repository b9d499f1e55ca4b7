"""What the benchmark compares: shapes, layers, and the ratios that are aimed at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from experiments.bench.case import Case
from experiments.bench.conditioning import conditional_cases
from experiments.bench.gradbench import gradbench_cases
from models import softmax_cross_entropy
from multint import GRU, LSTM, RNN, Additive, Bilinear, LSTMCell, MultiplicativeIntegration

MI_RNN = partial(RNN, integrator=MultiplicativeIntegration)
MI_LSTM = partial(LSTM, integrator=MultiplicativeIntegration)
MI_GRU = partial(GRU, integrator=MultiplicativeIntegration, reset_after=False)
ADDITIVE_GRU = partial(GRU, integrator=Additive)


@dataclass(frozen=True)
class BilinearCase(Case):
    """The full bilinear integrator by itself, against `nn.Bilinear`: B rows, X × H → H."""

    @property
    def rivals(self) -> list[str]:
        return ["vendor"]

    @property
    def references(self) -> list[str]:
        return self.rivals

    def build(self, contender: str) -> Callable[[], list[Tensor]]:
        torch.manual_seed(0)
        _, rows, inputs, hidden = self.size
        x, z = (torch.randn(rows, n, requires_grad=True) for n in (inputs, hidden))
        cotangent = torch.randn(rows, hidden)
        ours = Bilinear(inputs, hidden, hidden, x_term=False, z_term=False)
        module: nn.Module = ours
        if contender == "vendor":
            module = nn.Bilinear(inputs, hidden, hidden)
            with torch.no_grad():
                module.weight.copy_(ours.terms().W.transpose(1, 2))
                module.bias.copy_(ours.terms().b)

        def run() -> list[Tensor]:
            output = module(x, z)
            d_x, d_z, *rest = torch.autograd.grad(output, [x, z, *module.parameters()], cotangent)
            return [output, d_x, d_z, *(d.transpose(1, 2) if d.ndim == 3 and module is ours else d for d in rest)]

        return run


@dataclass(frozen=True)
class StepCase(Case):
    """One step of a cell, forward, as in sampling or in an environment: B rows, X → H."""

    @property
    def rivals(self) -> list[str]:
        return ["vendor"]

    @property
    def references(self) -> list[str]:
        return []  # the cell's step is what all else is compared with

    def build(self, contender: str) -> Callable[[], list[Tensor]]:
        torch.manual_seed(0)
        _, rows, inputs, hidden = self.size
        cell = (self.ours if contender == "ours" else self.vendor)(inputs, hidden)
        x, h, c = (torch.randn(rows, n) for n in (inputs, hidden, hidden))
        state = type(cell.initial_state(1))(h, c) if contender == "ours" else (h, c)  # type: ignore[operator]

        def run() -> list[Tensor]:
            with torch.no_grad():
                return list(cell(x, state))

        return run


@dataclass(frozen=True)
class SoftmaxCase(Case):
    """The softmax's loss in pieces against `cross_entropy` of all logits: T·B rows of X features, H symbols."""

    alone: bool = False  # where all logits are too many

    @property
    def rivals(self) -> list[str]:
        return [] if self.alone else ["vendor"]

    @property
    def references(self) -> list[str]:
        return self.rivals

    def build(self, contender: str) -> Callable[[], list[Tensor]]:
        torch.manual_seed(0)
        steps, rows, features, symbols = self.size
        sizes = ((steps * rows, features), (symbols, features), (symbols,))
        leaves = [torch.randn(*size).mul_(0.1).requires_grad_() for size in sizes]
        targets = torch.randint(symbols, (steps * rows,))

        def run() -> list[Tensor]:
            if contender == "ours":
                loss = softmax_cross_entropy(*leaves, targets)
            else:
                loss = nn.functional.cross_entropy(nn.functional.linear(*leaves), targets)
            return [loss, *torch.autograd.grad(loss, leaves)]

        return run


def _recurrent_cases() -> Iterator[Case]:
    """Multiplicative integration in each kind of layer, from small sizes, which most CPUs are given, to large ones."""
    sizes = {
        "64": ((100, 32, 64, 64), 0.8),
        "128": ((100, 16, 64, 128), 0.8),
        "128-of-1": ((200, 1, 32, 128), 0.6),  # a batch of one
        "256": ((100, 32, 256, 256), 0.85),
        "512": ((50, 32, 128, 512), 0.9),
        "1024": ((50, 32, 50, 1024), 0.85),
    }
    for name, (size, aim) in sizes.items():
        of_loop = 4.0 if size[-1] <= 128 else 1.3
        compiled_step = name in ("128", "512")
        yield Case(f"lstm-{name}", size, MI_LSTM, nn.LSTM, aim, of_loop, compiled_step=compiled_step, jax="lstm")
        yield Case(f"lstm-forward-{name}", size, MI_LSTM, nn.LSTM, 0.8, of_loop, backward=False, jax="lstm")
        yield Case(f"gru-{name}", size, MI_GRU, nn.GRU, 1.0, of_loop, jax="gru")
        yield Case(f"rnn-{name}", size, MI_RNN, nn.RNN, 1.0, of_loop, jax="rnn")


def cases() -> list[Case]:
    """All comparisons."""
    lstm, gru = nn.LSTM, nn.GRU
    return [
        *_recurrent_cases(),
        *(
            StepCase(f"step-{hidden}", (1, 1, 64, hidden), LSTMCell, nn.LSTMCell, 0.5, backward=False)
            for hidden in (64, 128, 256)
        ),
        Case("gru-additive-256", (100, 32, 256, 256), ADDITIVE_GRU, gru, 1.0, 2.0),
        Case("lstm-packed-1024", (50, 32, 50, 1024), MI_LSTM, lstm, 1.2, 1.3, packed=True),
        Case("lstm-bf16-512", (50, 32, 128, 512), MI_LSTM, lstm, 0.7, 1.3, dtype=torch.bfloat16),
        BilinearCase("bilinear", (1, 64, 64, 128), Bilinear, nn.Bilinear, 4.0),
        SoftmaxCase("softmax-10000", (64, 64, 256, 10_000), nn.Identity, at_least=0.77),
        SoftmaxCase("softmax-267735", (64, 64, 256, 267_735), nn.Identity, alone=True),
        *conditional_cases(),
        *gradbench_cases(),
    ]
