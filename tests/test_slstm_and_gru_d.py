"""The sLSTM and the GRU-D against their equations in NumPy, under both engines."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from multint import Additive, MultintError, Recurrent, explain, scan
from multint.cells import GRUDCell, SLSTMCell, observed
from tests.both_engines import close, inputs, results
from tests.catalogue import normal, randomise

T, B, H = 6, 3, 7


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def weights_of(module):
    return {name: weight.detach().numpy() for name, weight in module.named_parameters()}


# ---- sLSTM


def slstm():
    return randomise(SLSTMCell(5, H, Additive).double())


def test_slstm_is_a_weighted_mean():
    """Without the stabiliser, from c = n = 0."""
    cell, xs = slstm(), normal(T, B, 5)
    weights = weights_of(cell)
    h = c = n = np.zeros((B, H))
    for x, actual in zip(xs.numpy(), scan(cell, xs, cell.initial_state(B))[0], strict=True):
        Wx, Uh = x @ weights["gates.x_projection.weight"].T, h @ weights["gates.z_projection.weight"].T
        i, f, g, o = np.split(Wx + Uh + weights["gates.bias"], 4, axis=1)
        c, n = sigmoid(f) * c + np.exp(i) * np.tanh(g), sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        assert_close(actual, torch.from_numpy(h), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_slstm_does_not_overflow(engine):
    """Gates of ± 1000, of which the exponential has no number. Each output is a mean of numbers within ± 1."""
    cell = slstm().float()
    xs = (1000 * normal(20, B, 5)).float().requires_grad_()
    output, *others = results(cell, xs, cell.initial_state(B), engine)
    assert output.abs().max() <= 1
    assert all(part.isfinite().all() for part in others)


# ---- GRU-D

D = 3


def series(steps=T):
    """Values with gaps, and times."""
    values = normal(steps, B, D)
    values[normal(steps, B, D, seed=3) > 0] = torch.nan
    return values, normal(steps, B, seed=4).abs().cumsum(0)


def test_times_count_from_the_last_value_seen():
    nan = torch.nan
    values = torch.tensor([[1.0, nan], [nan, nan], [nan, 2.0], [3.0, nan]])
    seen = observed(values, torch.tensor([0.0, 1.0, 3.0, 7.0]))
    assert_close(seen[:, :2], torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
    assert_close(seen[:, 2:4], torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    assert_close(seen[:, 4:], torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 3.0], [7.0, 4.0]]))


def test_gru_d_is_the_papers_equations():
    cell = randomise(GRUDCell(3 * D, H, Additive).double())
    cell.mean.copy_(normal(D, seed=8))
    mean = cell.mean.numpy()
    weights = weights_of(cell)
    values, times = series()
    h, last = np.zeros((B, H)), np.broadcast_to(mean, (B, D))
    outputs = scan(cell, observed(values, times), cell.initial_state(B))[0]
    since = np.zeros((B, D))
    for t in range(T):
        if t:
            was_seen = ~np.isnan(values[t - 1].numpy())
            since = (times[t] - times[t - 1]).numpy()[:, None] + np.where(was_seen, 0, since)
        v = values[t].numpy()
        m = ~np.isnan(v)
        kept = np.exp(-np.maximum(0, weights["value_decay"] * since + weights["value_bias"]))
        known = np.concatenate([np.where(m, v, kept * last + (1 - kept) * mean), m], 1)
        last = np.where(m, v, last)
        h = h * np.exp(-np.maximum(0, since @ weights["state_decay.weight"].T + weights["state_decay.bias"]))
        parts = {
            name: (known @ weights[f"cell.{name}.x_projection.weight"].T, weights[f"cell.{name}.z_projection.weight"].T)
            for name in ("gates", "candidate")
        }
        r, z = np.split(sigmoid(parts["gates"][0] + h @ parts["gates"][1] + weights["cell.gates.bias"]), 2, axis=1)
        new = np.tanh(parts["candidate"][0] + (r * h) @ parts["candidate"][1] + weights["cell.candidate.bias"])
        h = (1 - z) * new + z * h
        assert_close(outputs[t], torch.from_numpy(h), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["slstm", "gru-d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_native_code_gives_what_the_loop_gives(name, dtype):
    cell = slstm() if name == "slstm" else randomise(GRUDCell(3 * D, H).double())
    cell.to(dtype)
    xs, state = inputs(cell, T, B, dtype)
    if name == "gru-d":  # NaN in the gaps themselves, through which no gradient may come
        values, times = series()
        xs = observed(values, times).to(dtype)
        xs[..., :D] = values
        xs.requires_grad_()
    for first in (state, cell.initial_state(B)):
        expected = results(cell, xs, first, "loop")
        assert all(part.isfinite().all() for part in expected)
        close(results(cell, xs, first, "fused"), expected, dtype)
    assert str(explain(cell)).count("by native code") == 2


def test_a_layer_takes_them_with_lengths():
    values, times = series()
    rnn = Recurrent(3 * D, H, partial(GRUDCell, integrator=Additive), bidirectional=True)
    output, _ = rnn(observed(values, times).float(), lengths=torch.tensor([6, 4, 1]))
    assert output.shape == (T, B, 2 * H)
    assert Recurrent(5, H, SLSTMCell, num_layers=2)(normal(T, B, 5).float())[0].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GRUDCell(4, H), "input_size is 4, expected a multiple of 3"),
        (lambda: observed(torch.zeros(4, 2, 3), torch.zeros(3)), "expected \\(T, B, D\\) or \\(T, D\\)"),
        (lambda: observed(torch.zeros(3, 1), torch.tensor([0.0, 2.0, 1.0])), "the times fall"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(MultintError, match=message):
        call()
