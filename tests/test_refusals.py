"""What `fused` must refuse, what it may refuse but never get wrong, and what it has to take.

Each table has one line of a step for each way of going wrong. `auto` equals the loop on all of them.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from multint import Cell, explain, scan
from multint.cells import HiddenState, LSTMState
from multint.errors import EngineError
from tests.both_engines import ENGINES, Free, close, compare, inputs, results, right_or_refused, weight
from tests.catalogue import HIDDEN_SIZE, INPUT_SIZE, normal

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("poisoned", "eager", "worth_compiling")]

ROWS_MEET = "rows .*(see each other|interact|meet)"


def refused(cell, xs, state, message):
    """By name the cell is refused with this message, at every call."""
    for _ in range(2):  # the second refusal is a kept one
        with pytest.raises(EngineError, match=message):
            scan(cell, xs, state, engine="fused")


def base(cell, x, h):
    """What the steps have in common: a product of each stream, and nothing that grows."""
    return (x @ cell.W + h @ cell.U).tanh()


# Rows that see each other, also where no random trial is likely to show it: beyond what it draws, or too little to see.
ROWS_SEE_EACH_OTHER = {
    "guard-beyond-50": lambda cell, x, h: base(cell, torch.where((x.abs() > 50).any(), x * 0.01, x), h),
    "guard-isinf": lambda cell, x, h: torch.where(h.isinf().any(), torch.zeros_like(h), base(cell, x, h)),
    "guard-isnan-all": lambda cell, x, h: torch.where(x.isnan().all(), h, base(cell, x, h)),
    "guard-of-the-largest": lambda cell, x, h: torch.where(x.max() > 1e6, h, base(cell, x, h)),
    "guard-of-a-norm": lambda cell, x, h: base(cell, x * (1e9 / x.norm().clamp(min=1e9)), h),
    "mean-times-1e-12": lambda cell, x, h: base(cell, x + 1e-12 * x.mean(0), h),
    "sum-times-1e-300": lambda cell, x, h: base(cell, x, h) + 1e-300 * h.sum(),
    "mean-times-a-weight-at-0": lambda cell, x, h: base(cell, x + cell.k * x.mean(0), h),
    "mean-of-the-state": lambda cell, x, h: base(cell, x, h - h.mean(0, keepdim=True)),
    "variance": lambda cell, x, h: base(cell, x, h) * h.var(0, correction=0),
    "largest": lambda cell, x, h: base(cell, x, h) * h.amax(0),
    "smallest": lambda cell, x, h: base(cell, x - x.min(0).values, h),
    "flip": lambda cell, x, h: base(cell, x.flip(0), h),
    "roll": lambda cell, x, h: base(cell, x, h.roll(1, 0)),
    "cumsum": lambda cell, x, h: base(cell, x.cumsum(0), h),
    "softmax": lambda cell, x, h: base(cell, x, h) * h.softmax(0),
    "logsumexp": lambda cell, x, h: base(cell, x, h) - h.logsumexp(0),
    "normalize": lambda cell, x, h: base(cell, F.normalize(x, dim=0), h),
    "sort": lambda cell, x, h: base(cell, x.sort(0).values, h),
    "argsort": lambda cell, x, h: base(cell, x, h) + x[:, :1].argsort(0),
    "first-row": lambda cell, x, h: base(cell, x, h) + h[:1],
    "last-row": lambda cell, x, h: base(cell, x, h) * h[-1],
    "rows-by-an-index": lambda cell, x, h: base(cell, x[torch.arange(x.shape[0] - 1, -1, -1)], h),
    "gram": lambda cell, x, h: base(cell, (x @ x.t()) @ x / 10, h),
    "gram-by-einsum": lambda cell, x, h: base(cell, torch.einsum("bi,ci,cj->bj", x, x, x) / 10, h),
    "distances": lambda cell, x, h: base(cell, x, h) * torch.cdist(x, x).sum(-1, keepdim=True),
    "product-over-the-rows": lambda cell, x, h: base(cell, x, h) @ (h.t() @ h),
    "reshaped-across": lambda cell, x, h: base(cell, x, h) + h.reshape(HIDDEN_SIZE, -1).t(),
    "running-over-all": lambda cell, x, h: base(cell, x.reshape(-1).cumsum(0).reshape(x.shape), h),
    "attention-over-the-rows": lambda cell, x, h: base(cell, x, F.scaled_dot_product_attention(h, h, h)),
    "batch-norm-in-training": lambda cell, x, h: base(cell, F.batch_norm(x, None, None, training=True), h),
    "pooled-behind-a-gate": lambda cell, x, h: base(
        cell, torch.where(x.abs() > 50, F.avg_pool1d(x.t()[None], 3, 1, 1)[0].t(), x), h
    ),
    "normed-behind-a-gate": lambda cell, x, h: base(
        cell, torch.where(x.abs() > 50, F.layer_norm(x.t(), (x.shape[0],)).t(), x), h
    ),
    "rolled-when-flat": lambda cell, x, h: base(cell, x.reshape(-1, 1).roll(1, 0).reshape(x.shape), h),
    "flipped-when-flat": lambda cell, x, h: base(cell, x.reshape(-1, 1).flip(0).reshape(x.shape), h),
    "gathered-when-flat": lambda cell, x, h: (
        base(cell, x, h) + h.reshape(-1, 1).gather(0, (h.reshape(-1, 1) > 0).long()).reshape(h.shape)
    ),
    "summed-when-flat": lambda cell, x, h: base(cell, x, h) + h.reshape(-1, 1).sum(0),
    "doubled-and-paired": lambda cell, x, h: base(cell, x, h) + torch.cat([h, h]).reshape(-1, 2, HIDDEN_SIZE).sum(1),
    "windows-of-rows": lambda cell, x, h: base(cell, x, h) + F.pad(h, (0, 0, 1, 0)).unfold(0, 2, 1).sum(-1),
    "convolved-over-the-rows": lambda cell, x, h: (
        base(cell, x, h) + F.conv1d(h.t()[None], cell.U[:, :, None].expand(-1, -1, 3), padding=1)[0].t()
    ),
    "product-of-all-pairs": lambda cell, x, h: base(cell, x, h) * (h[:, None] * h[None]).flatten(1).amax(1, True),
    "running-over-flat-rows": lambda cell, x, h: base(cell, x, h) + h.reshape(-1, 1).cumsum(0).reshape(h.shape),
    "at-200-rows": lambda cell, x, h: base(cell, x, h) * (2.0 if x.shape[0] == 200 else 1.0),
    "at-multiples": lambda cell, x, h: base(cell, x, h) * (2.0 if x.shape[0] % 256 == 0 else 1.0),
    "counted": lambda cell, x, h: base(cell, x, h) / (1 + (h > 100).sum()),
}


# What happens to be known by the number of rows too, which another algorithm or another shape goes by.
FIX_THE_NUMBER_OF_ROWS = (
    "at-200-rows",
    "at-multiples",
    "normed-behind-a-gate",
    "gram-by-einsum",
    "distances",
    "reshaped-across",
)


@pytest.mark.parametrize("name", ROWS_SEE_EACH_OTHER)
def test_rows_that_see_each_other_are_refused_and_the_loops_under_auto(name):
    """Also where the guard comes into play, as it does for one row of three in the end."""
    cell = Free(ROWS_SEE_EACH_OTHER[name]).float()
    xs, state = inputs(cell)
    right_or_refused(cell, xs, state)
    or_their_number = "|the number of rows" if name in FIX_THE_NUMBER_OF_ROWS else ""
    refused(cell, xs, state, ROWS_MEET + or_their_number)
    xs = xs.detach().clone()
    xs[1, 1] *= 1e3
    right_or_refused(cell, xs.requires_grad_(), state)


class Symbols(Cell):
    """A cell of an integer stream and a bool one."""

    def __init__(self, line):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.embedding = nn.Embedding(11, HIDDEN_SIZE)
        self.embedding.weight.data = normal(11, HIDDEN_SIZE)
        self.U = weight(HIDDEN_SIZE, HIDDEN_SIZE)
        self.line = line

    def step(self, x, state):
        return HiddenState(self.line(self.embedding(x["symbol"]) + state.h @ self.U, x).tanh())

    def initial_state(self, batch_size):
        return HiddenState(self.zeros(batch_size, HIDDEN_SIZE))


def symbols():
    generator = torch.Generator().manual_seed(0)
    xs = {"symbol": torch.randint(11, (4, 3), generator=generator), "on": normal(4, 3) > 0}
    return xs, HiddenState(normal(3, HIDDEN_SIZE).float().requires_grad_())


SYMBOLS_SEE_EACH_OTHER = {
    "largest": lambda y, x: y / (1 + x["symbol"].max()),
    "sum": lambda y, x: y * (1 + x["symbol"].sum()),
    "sorted": lambda y, x: y + x["symbol"].sort().values.unsqueeze(-1),
    "equal": lambda y, x: y * (x["symbol"].unsqueeze(0) == x["symbol"].unsqueeze(1)).sum(-1, keepdim=True),
    "any": lambda y, x: torch.where(x["on"].any(), y, -y),
    "count": lambda y, x: y * x["on"].sum(),
}


def test_rows_that_see_each_other_in_a_gradient_alone():
    """Each row's part is divided by how many rows have the same symbol."""
    cell = Symbols(lambda y, x: y).float()
    cell.embedding.scale_grad_by_freq = True
    right_or_refused(cell, *symbols())
    refused(cell, *symbols(), ROWS_MEET)


def test_a_sparse_gradient_is_refused():
    cell = Symbols(lambda y, x: y).float()
    cell.embedding.sparse = True
    right_or_refused(cell, *symbols())
    refused(cell, *symbols(), "cannot be differentiated: .*sparse")


@pytest.mark.parametrize("name", SYMBOLS_SEE_EACH_OTHER)
def test_rows_of_integers_and_bools_that_see_each_other(name):
    cell = Symbols(SYMBOLS_SEE_EACH_OTHER[name]).float()
    right_or_refused(cell, *symbols())
    refused(cell, *symbols(), ROWS_MEET)


def with_gradients_off(cell, x, h):
    with torch.no_grad():
        y = h.square()
    return base(cell, x, h) + y


def with_gradients_off_by_call(cell, x, h):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = h.square()
    torch.set_grad_enabled(before)
    return base(cell, x, h) + y


def with_gradients_on(cell, x, h):
    with torch.enable_grad():
        return base(cell, x, h)


def in_inference_mode(cell, x, h):
    with torch.inference_mode():
        y = x.square().sum(-1, keepdim=True)
    return base(cell, x, h) * float(y.ndim)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -0.5 * gradient


class Damped(torch.autograd.Function):
    """The identity with a gradient of its own, in the form that a trace can pass through: only a trial sees it."""

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 0.9 * gradient


class Rounded(torch.autograd.Function):
    """The sign, passed straight through where it is small."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 0.5)


def clipped(cell, x, h):
    y = base(cell, x, h)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    return y


def clipped_input(cell, x, h):
    y = h * 1.0
    if y.requires_grad:
        y.register_hook(lambda gradient: 2 * gradient)
    return base(cell, x, y)


def by_the_steps_own_gradient(cell, x, h):
    with torch.enable_grad():
        v = h if h.requires_grad else h.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(v.pow(3).sum(), v, create_graph=True)
    return base(cell, x, h) + 0.1 * gradient


def unpacked_in_place(cell, x, h):
    y = base(cell, x, h)
    h.data.mul_(1.0)
    return y


def written(cell, x, h):
    h = h.clone()
    h.data[:, 0] = 0.5
    return base(cell, x, h)


def at_the_first_rows_only(cell, x, h):
    return base(cell, x, h) + torch.arange(x.shape[0]).unsqueeze(-1).to(x.dtype)


# What a graph of operations does not show, or shows otherwise than it is: refused, or right in all gradients.
RIGHT_OR_REFUSED = {
    "data-of-h": lambda cell, x, h: base(cell, x, h) + h.data,
    "data-of-h-alone": lambda cell, x, h: base(cell, x, h.data),
    "data-of-x": lambda cell, x, h: base(cell, x.data, h),
    "data-of-a-weight": lambda cell, x, h: base(cell, x, h @ cell.U.data),
    "data-of-a-vector": lambda cell, x, h: base(cell, x, h) * cell.a.data,
    "data-of-a-temporary": lambda cell, x, h: base(cell, x, (h * cell.a).data),
    "data-written": written,
    "data-of-the-state-written": unpacked_in_place,
    "no-grad": with_gradients_off,
    "set-grad-enabled": with_gradients_off_by_call,
    "enable-grad": with_gradients_on,
    "inference-mode": in_inference_mode,
    "own-backward-that-is-traced": lambda cell, x, h: base(cell, x, Damped.apply(h)),
    "straight-through-when-recorded": lambda cell, x, h: base(
        cell, x, h + (h.round() - h).detach() if torch.is_grad_enabled() else h.round()
    ),
    "is-grad-enabled-in-a-term": lambda cell, x, h: base(cell, x, h) + (0.5 if torch.is_grad_enabled() else 0.0),
    "is-grad-enabled": lambda cell, x, h: base(cell, x, h) * (0.5 if torch.is_grad_enabled() else 2.0),
    "is-inference": lambda cell, x, h: base(cell, x, h) * (0.5 if torch.is_inference_mode_enabled() else 2.0),
    "requires-grad-of-h": lambda cell, x, h: base(cell, x, h) * (0.5 if h.requires_grad else 2.0),
    "requires-grad-of-x": lambda cell, x, h: base(cell, x, h) * (0.5 if x.requires_grad else 2.0),
    "requires-grad-of-a-weight": lambda cell, x, h: base(cell, x, h) * (0.5 if cell.U.requires_grad else 2.0),
    "requires-grad-of-a-temporary": lambda cell, x, h: base(cell, x, h) * (0.5 if (2 * h).requires_grad else 2.0),
    "grad-fn": lambda cell, x, h: base(cell, x, h) * (0.5 if h.grad_fn is None else 2.0),
    "leaf": lambda cell, x, h: base(cell, x, h) * (0.5 if h.is_leaf else 2.0),
    "grad": lambda cell, x, h: base(cell, x, h) * (0.5 if cell.U.grad is None else 2.0),
    "own-backward": lambda cell, x, h: base(cell, x, Reversed.apply(h)),
    "own-backward-on-the-input": lambda cell, x, h: base(cell, Reversed.apply(x), h),
    "own-backward-on-a-weight": lambda cell, x, h: (x @ cell.W + h @ Reversed.apply(cell.U)).tanh(),
    "own-straight-through": lambda cell, x, h: base(cell, x, h) + 0.1 * Rounded.apply(h),
    "tensor-hook": clipped,
    "tensor-hook-before": clipped_input,
    "checkpoint": lambda cell, x, h: checkpoint(base, cell, x, h, use_reentrant=False),
    "own-gradient": by_the_steps_own_gradient,
    "func-grad": lambda cell, x, h: base(cell, x, h) + 0.1 * torch.func.grad(lambda v: v.pow(3).sum())(h),
    "version": lambda cell, x, h: base(cell, x, h) * (1 + x._version),
}

# The same of numbers and sizes, for which it is all one what wants a gradient.
OF_NUMBERS_AND_SIZES = {
    "vmap": lambda cell, x, h: base(cell, x, torch.vmap(lambda row: row.cumsum(0))(h) / 10),
    "complex": lambda cell, x, h: base(cell, x, torch.view_as_real(torch.complex(h, h) * 1j).sum(-1)),
    "fft": lambda cell, x, h: base(cell, x, torch.fft.rfft(h, dim=-1).abs()[:, :1] * h),
    "number-of-rows": lambda cell, x, h: base(cell, x, h) / x.shape[0],
    "place-in-the-batch": at_the_first_rows_only,
    "value": lambda cell, x, h: base(cell, x, h) * (0.5 if float(h.detach().sum()) > 0 else 2.0),
    "list": lambda cell, x, h: base(cell, x, h) * (0.5 if h.detach().tolist()[0][0] > 0 else 2.0),
    "numpy": lambda cell, x, h: base(cell, x, h) * float(h.detach().numpy().mean()),
    "strides": lambda cell, x, h: base(cell, x, h) * (0.5 if x.is_contiguous() else 2.0),
    "more-rows-than-one": lambda cell, x, h: base(cell, x, h) * (0.5 if x.shape[0] > 1 else 2.0),
    "squeezed": lambda cell, x, h: (
        base(cell, x, h) * (h.unsqueeze(2).squeeze().unsqueeze(1) * h.unsqueeze(2)).sum(1) / 10
    ),
}

CIRCUMSTANCES = {
    "all": (True, True),
    "input-without-gradient": (False, True),
    "frozen-weights": (True, False),
}


def wanting(cell, xs, state, of_inputs, of_weights):
    """The inputs, with a gradient or without; the weights likewise."""
    for parameter in cell.parameters():
        parameter.requires_grad_(of_weights)
    return (
        xs.detach().requires_grad_(of_inputs),
        type(state)(*(f.detach().requires_grad_(of_inputs) for f in state)),
    )


@pytest.mark.parametrize("name", RIGHT_OR_REFUSED)
def test_what_a_graph_does_not_show_is_right_or_refused(name):
    """By one cell: what is kept for one circumstance must not serve another. Without gradients first and last."""
    cell = Free(RIGHT_OR_REFUSED[name]).float()
    xs, state = inputs(cell)
    with torch.no_grad():
        right_or_refused(cell, xs, state)
    for circumstance in CIRCUMSTANCES.values():
        right_or_refused(cell, *wanting(cell, xs, state, *circumstance))
    of_one_row = wanting(cell, xs[:, :1], HiddenState(state.h[:1]), True, True)
    right_or_refused(cell, *of_one_row)
    with torch.no_grad():
        right_or_refused(cell, *wanting(cell, xs, state, True, True))


@pytest.mark.parametrize("name", OF_NUMBERS_AND_SIZES)
def test_what_a_graph_does_not_show_of_numbers_is_right_or_refused(name):
    cell = Free(OF_NUMBERS_AND_SIZES[name]).float()
    xs, state = inputs(cell)
    right_or_refused(cell, xs, state)
    right_or_refused(cell, *wanting(cell, xs[:, :1], HiddenState(state.h[:1]), True, True))
    with torch.no_grad():
        right_or_refused(cell, xs, state)


def swapped_columns(cell, x, h):
    v = x.clone()
    v[:, 0] = x[:, 1]
    return base(cell, v, h)


def swapped_columns_of_the_state(cell, x, h):
    v = h.clone()
    v[:, 0] = h[:, 1]
    return base(cell, x, v)


def added_in_place(cell, x, h):
    y = x @ cell.W
    y += h @ cell.U
    return y.mul_(cell.a).tanh_()


def filled_in_parts(cell, x, h):
    y = torch.zeros_like(h)
    y[:, :3] = h[:, :3]
    y[:, 3:] += (x @ cell.W)[:, 3:]
    return base(cell, x, y)


def by_literals(cell, x, h):
    decay = torch.tensor([0.1 * i for i in range(HIDDEN_SIZE)], dtype=h.dtype)
    return base(cell, x, h * decay) * torch.tensor(0.5)


TAKEN = {
    "cosine-similarity": lambda cell, x, h: base(cell, x, h) * F.cosine_similarity(x @ cell.W, h, dim=-1)[:, None],
    "columns-in-place": swapped_columns,
    "columns-of-the-state-in-place": swapped_columns_of_the_state,
    "added-in-place": added_in_place,
    "filled-in-parts": filled_in_parts,
    "masked-in-place": lambda cell, x, h: base(cell, x, h.clone().masked_fill_(h > 0.5, 0.5)),
    "heaviside-of-the-input": lambda cell, x, h: base(cell, torch.heaviside(x.detach(), torch.ones_like(x)) + x, h),
    "heaviside-alone": lambda cell, x, h: base(cell, torch.heaviside(x.detach(), x.new_zeros(())), h),
    "detached": lambda cell, x, h: base(cell, x, h) + 0.1 * h.detach() * cell.a,
    "straight-through": lambda cell, x, h: base(cell, x, h + (h.sign() - h).detach()),
    "straight-through-input": lambda cell, x, h: base(cell, x + (x.round() - x).detach(), h),
    "literals": by_literals,
    "literal-of-a-list": lambda cell, x, h: base(cell, x, h) * torch.tensor([0.5]),
    "scalar-literal": lambda cell, x, h: torch.maximum(base(cell, x, h), torch.tensor(0.0, dtype=h.dtype)),
    "sum": lambda cell, x, h: base(cell, x, h) * h.sum(-1, keepdim=True),
    "sum-of-both": lambda cell, x, h: base(cell, x, h) * h.sum(1).unsqueeze(1) * x.sum((1,), keepdim=True),
    "mean": lambda cell, x, h: base(cell, x - x.mean(-1, keepdim=True), h),
    "variance": lambda cell, x, h: base(cell, x, h / (h.var(-1, keepdim=True) + 1).sqrt()),
    "norm": lambda cell, x, h: base(cell, x, h / (1 + h.norm(dim=-1, keepdim=True))),
    "largest": lambda cell, x, h: base(cell, x, h - h.amax(-1, keepdim=True)),
    "softmax": lambda cell, x, h: base(cell, x, h.softmax(-1)),
    "log-softmax": lambda cell, x, h: base(cell, x, h).log_softmax(-1),
    "logsumexp": lambda cell, x, h: base(cell, x, h) * h.logsumexp(-1, keepdim=True),
    "layer-norm": lambda cell, x, h: base(cell, x, F.layer_norm(h, (h.shape[-1],), cell.a, cell.a)),
    "normalize": lambda cell, x, h: base(cell, F.normalize(x, dim=-1), h),
    "by-the-device": lambda cell, x, h: base(cell, x, h) * (0.5 if h.is_cpu and not h.is_xpu else 2.0),
    "sgn": lambda cell, x, h: base(cell, x, h * h.sgn()),
    "flip-of-features": lambda cell, x, h: base(cell, x, h.flip(-1)),
    "outer-product": lambda cell, x, h: base(cell, x, h) + torch.einsum("bi,bj->bij", h, x).sum((-1, -2))[:, None],
}


@pytest.mark.parametrize("name", sorted(set(TAKEN) - {"literals"}))
def test_what_works_on_each_row_is_taken(name):
    """No size is taken for the number of rows, of which there are 7 or 64 while a step is traced."""
    cell = Free(TAKEN[name], input_size=7, hidden_size=64).double()
    for rows in (3, 64):
        compare(cell, 3, rows)


def test_a_stream_of_no_features_is_taken():
    cell = Free(base).double()
    cell.W = nn.Parameter(cell.W[:0])
    xs, state = normal(4, 3, 0), inputs(cell)[1]
    close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float64)


def test_literals_are_taken():
    compare(Free(TAKEN["literals"]).double(), 4, 3)


class Sets(Cell):
    """A cell whose state is a set of vectors for each row."""

    def __init__(self, line):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.read = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.write = nn.Linear(INPUT_SIZE, HIDDEN_SIZE)
        self.norm = nn.LayerNorm(HIDDEN_SIZE)
        self.line = line

    def step(self, x, state):
        return HiddenState(self.line(self, self.write(x).unsqueeze(1), state.h))

    def initial_state(self, batch_size):
        return HiddenState(self.zeros(batch_size, 4, HIDDEN_SIZE))


SETS = {
    "linear-with-bias": lambda cell, x, h: (cell.read(h) + x).tanh(),
    "linear-without-bias": lambda cell, x, h: (F.linear(h, cell.read.weight) + x).tanh(),
    "attention": lambda cell, x, h: (F.scaled_dot_product_attention(cell.read(h), h, h) + x).tanh(),
    "attention-to-the-input": lambda cell, x, h: (F.scaled_dot_product_attention(x, h, h) + cell.read(h)).tanh(),
    "attention-by-hand": lambda cell, x, h: ((cell.read(h) @ h.mT).softmax(-1) @ h + x).tanh(),
    "norm": lambda cell, x, h: cell.norm(h + x) + cell.read(h),
    "mean-of-the-set": lambda cell, x, h: (h - h.mean(1, keepdim=True) + x * cell.read(h)).tanh(),
}


@pytest.mark.parametrize("name", SETS)
def test_states_of_three_dimensions_are_taken(name):
    torch.manual_seed(0)
    cell = Sets(SETS[name]).double()
    compare(cell, 3, 3)
    compare(cell, 2, 4)  # as many rows as vectors in a set


class Normed(Free):
    """A step with batch norm, whose running statistics are not those of the start."""

    def __init__(self):
        super().__init__(lambda cell, x, h: base(cell, cell.of_x(x), cell.of_h(h)))
        self.of_x, self.of_h = nn.BatchNorm1d(INPUT_SIZE), nn.BatchNorm1d(HIDDEN_SIZE)
        self.of_x.running_mean.fill_(0.3)
        self.of_h.running_var.fill_(2.0)


def test_batch_norm_is_taken_in_evaluation_and_refused_in_training():
    cell = Normed().double()
    compare(cell.eval(), 4, 3)
    refused(cell.train(), *inputs(cell), "rows|changes the cell|writes to")
    compare(cell.eval(), 4, 3)


NAMES_ITS_DTYPE = {
    torch.bfloat16: lambda cell, x, h: base(cell, x.to(torch.bfloat16), h) + torch.ones(7, dtype=torch.bfloat16) / 8,
    torch.float32: lambda cell, x, h: torch.mm(h.to(torch.float32), cell.U).tanh() + torch.mm(x.float(), cell.W),
}


@pytest.mark.parametrize("dtype", NAMES_ITS_DTYPE, ids=str)
def test_a_cell_that_names_its_dtype_is_taken(dtype):
    cell = Free(NAMES_ITS_DTYPE[dtype]).to(dtype)
    xs, state = inputs(cell, dtype=dtype)
    outcomes = [results(cell, xs, state, engine) for engine in ("fused", "loop")]
    for actual, expected in zip(*outcomes, strict=True):
        assert actual.dtype == expected.dtype
        error = (actual.double() - expected.double()).norm()
        assert error <= 8 * torch.finfo(dtype).eps * expected.double().norm()


class Both(NamedTuple):
    h: Tensor
    c: Tensor


class Retyped(Cell):
    """A step that gives its state in a form of its own."""

    def __init__(self, form):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.W, self.U = weight(INPUT_SIZE, HIDDEN_SIZE), weight(HIDDEN_SIZE, HIDDEN_SIZE)
        self.form = form

    def step(self, x, state):
        h, c = state
        c = 0.5 * c + base(self, x, h)
        return self.form(c.tanh(), c)

    def initial_state(self, batch_size):
        return Both(self.zeros(batch_size, HIDDEN_SIZE), self.zeros(batch_size, HIDDEN_SIZE))


FORMS = {"another": LSTMState, "tuple": lambda *fields: fields, "list": lambda *fields: list(fields), "own": Both}


@pytest.mark.parametrize("name", FORMS)
def test_the_final_state_is_of_the_steps_own_type(name):
    cell = Retyped(FORMS[name]).float()
    for steps in (1, 4):
        xs, state = inputs(cell, steps)
        expected, last = scan(cell, xs, state, engine="loop")
        for engine in ENGINES:
            output, final = scan(cell, xs, state, engine)
            assert type(final) is type(last)
            close([output, *final], [expected, *last], torch.float32)
            assert explain(cell).engine == "fused" or steps == 1  # which is no loop


def test_a_step_that_goes_by_the_states_type_is_right_or_refused():
    cell = Retyped(LSTMState).float()
    step = cell.step
    cell.step = lambda x, state: step(x if isinstance(state, LSTMState) else 2 * x, state)
    for steps in (1, 4):
        right_or_refused(cell, *inputs(cell, steps))
