"""Batch normalisation within a recurrent step, with statistics of its own at every step in time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from multint.errors import OptionError, ShapeError
from multint.integrators.checks import flag, number, positive, probability


class RecurrentBatchNorm(nn.Module):
    """BN(p; γ, β) = γ ⊙ (p − m_t) / √(v_t + ε) + β, with m_t and v_t over the sequences of a batch at step t.

    As the norm of `Normalised` it gives BN(Wx; γ) and BN(Uz; γ) for an integrator's products, and with `bias=True` as
    an LSTM's `memory_norm` BN(c; γ, β). γ and β are the same at all steps.

    In training, mean and biased variance are those of the batch at this step, without sequences that have ended
    (`lengths=`). Of a sequence that goes on alone, BN gives β, and nothing is learnt of the population. In evaluation
    they are the population's at this step. These are buffers: training estimates them on the way, from all it has seen,
    each pass with 1 − momentum times the weight of the next one, and `population_statistics` estimates them anew. Step
    `max_steps` − 1 and all after it share one mean and variance, and a step that training has never reached takes those
    of the last that it has.

    The cell is written as with any norm. What step it is and which sequences have ended, the layer around it
    (`multint.Recurrent`) tells each norm before it runs the cell's step. It counts from the first step of a call, and
    backwards from each sequence's own last one. So it takes neither a state nor resets unless `max_steps` is 1. Rows
    see each other, so it runs by the loop.

    Args:
        features: F.
        gain: what γ starts at. With 1 the gradient does not keep its size over hundreds of steps; see section 4 there.
        bias: whether there is a β, which starts at 0. An integrator has a bias of its own.
        max_steps: for how many steps statistics are kept: no more than many sequences have, since those of few rows are
            poor ones, which all later steps would take.
        momentum: the part of its weight that the past loses with every pass in training.

    Raises: OptionError for a setting out of range, and outside of a layer; ShapeError for a p that is not (B, F), and
    in training for a single row.
    Source: Cooijmans et al. 2016, eqs. 6 to 8 and section 3.
    """

    mean: Tensor  # (max_steps, F)
    variance: Tensor  # (max_steps, F)
    count: Tensor  # (max_steps,): rows that were seen, each by its weight

    def __init__(
        self,
        features: int,
        gain: float = 0.1,
        bias: bool = False,
        max_steps: int = 100,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.features = positive(self, "features", features)
        self.max_steps = positive(self, "max_steps", max_steps)
        self.momentum = probability(self, "momentum", momentum)
        self.eps = number(self, "eps", eps)
        if self.eps <= 0:
            raise OptionError(f"RecurrentBatchNorm: eps is {eps!r}, expected more than 0")
        self.weight = nn.Parameter(torch.full((features,), float(number(self, "gain", gain))))
        self.bias = nn.Parameter(torch.zeros(features)) if flag(self, "bias", bias) else None
        self.register_buffer("mean", torch.zeros(max_steps, features))
        self.register_buffer("variance", torch.ones(max_steps, features))
        self.register_buffer("count", torch.zeros(max_steps))
        # The step's number () and where (B,) the sequences go on, None for all: set by the layer during a step.
        self.now: tuple[Tensor, Tensor | None] | None = None
        # Of each step of the pass under way in training: its number, its rows, their mean and their variance.
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(
        self,
        p: Tensor,  # (B, F)
    ) -> Tensor:  # (B, F)
        if self.now is None:
            raise OptionError(
                "RecurrentBatchNorm: there is no step in time here, expected a cell within a layer, multint.Recurrent"
            )
        if p.ndim != 2 or p.shape[1] != self.features:
            raise ShapeError(f"RecurrentBatchNorm: p has the shape {tuple(p.shape)}, expected (B, {self.features})")
        time, going_on = self.now
        mean, variance = self._of_batch(p, time, going_on) if self.training else self._of_population(time)
        y = (p - mean) * ((variance + self.eps).rsqrt() * self.weight)
        return y if self.bias is None else y + self.bias

    def _of_population(self, time: Tensor) -> tuple[Tensor, Tensor]:
        # Sequences begin together, so that the steps that were seen are the first ones.
        at = torch.minimum(time, (self.count > 0).sum().clamp(min=1) - 1).view(1)
        return self.mean.index_select(0, at), self.variance.index_select(0, at)

    def _of_batch(self, p: Tensor, time: Tensor, going_on: Tensor | None) -> tuple[Tensor, Tensor]:
        if len(p) < 2:
            raise ShapeError("RecurrentBatchNorm: there is one sequence in the batch, expected more in training")
        if going_on is None:
            rows = self.count.new_full((), len(p))
            variance, mean = torch.var_mean(p, 0, correction=0)
        else:
            rows, going_on = going_on.sum().to(self.count.dtype), going_on.unsqueeze(1)
            mean = torch.where(going_on, p, 0).sum(0) / rows.clamp(min=1)
            variance = torch.where(going_on, p - mean, 0).square().sum(0) / rows.clamp(min=1)
        # One row has no variance: taken for the population's, 0 would blow up whatever comes there in evaluation.
        counted = torch.where(rows > 1, rows, 0)
        self.seen.append((time, counted, mean.detach().to(self.mean), variance.detach().to(self.mean)))
        return mean, variance

    @torch.no_grad()
    def end_pass(self) -> None:
        """Pool the statistics with those of the steps of a pass in training. The layer calls it after the last step."""
        if not self.seen:
            return
        times, of_step, means, variances = map(torch.stack, zip(*self.seen, strict=True))
        self.seen = []
        at, of_step = times.clamp(max=self.max_steps - 1), of_step.unsqueeze(1)
        nothing = torch.zeros_like(self.mean)
        # First the rows of the pass that share a place, as all do whose step is past the last one.
        rows = torch.zeros_like(self.count).unsqueeze(1).index_add(0, at, of_step)
        mean = nothing.index_add(0, at, of_step * means) / rows.clamp(min=1)
        spread = variances + (means - mean[at]).square()
        variance = nothing.index_add(0, at, of_step * spread) / rows.clamp(min=1)
        # Then those with what was kept, where there are any.
        before = self.count.unsqueeze(1)
        count = torch.where(rows > 0, (1 - self.momentum) * before + rows, before)
        share, change = rows / count.clamp(min=1), mean - self.mean
        self.variance.lerp_(variance, share).add_(share * (1 - share) * change.square())
        self.mean.add_(share * change)
        self.count.copy_(count.squeeze(1))

    def reset_statistics(self) -> None:
        """Forget all rows that were seen."""
        self.mean.zero_()
        self.variance.fill_(1.0)
        self.count.zero_()

    def extra_repr(self) -> str:
        return f"{self.features}, bias={self.bias is not None}, max_steps={self.max_steps}, momentum={self.momentum}"


@contextmanager
def population_statistics(network: nn.Module) -> Iterator[None]:
    """Estimate the statistics of the network's `RecurrentBatchNorm`s anew, of all rows that pass in this block.

        with population_statistics(network):
            for x, lengths in training_data:
                network(x, lengths=lengths)

    In the block the network runs without gradients and as in evaluation, so without dropout and noise, but each
    `RecurrentBatchNorm` normalises by the batch. The estimate is the mean and the biased variance over all rows of all
    batches, without those that go on alone. After an error the old statistics stand.

    Raises: OptionError for a network that has no such norm, and where nothing passed in the block.
    """
    norms = [part for part in network.modules() if isinstance(part, RecurrentBatchNorm)]
    if not norms:
        raise OptionError(f"population_statistics: {type(network).__name__} has no RecurrentBatchNorm")
    modes = [(part, part.training) for part in network.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
        norm.reset_statistics()
    try:
        with torch.no_grad():
            yield
        if not all(bool(norm.count[0]) for norm in norms):
            raise OptionError("population_statistics: no batch has passed through every RecurrentBatchNorm")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for buffer, old in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(old)
        raise
    finally:
        for part, mode in modes:
            part.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
