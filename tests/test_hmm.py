"""Hidden Markov models against the sum over all hidden paths."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models import HiddenMarkovModel
from multint import Hadamard, MultintError, MultiplicativeIntegration, RNNCell, scan
from multint.cells import HiddenState

pytestmark = pytest.mark.compiles

S, K = 3, 4


def distributions(*shape, seed, zeros=False, dtype=torch.float64):
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    if zeros:  # of a left-to-right model
        weights = weights.triu()
    return (weights / weights.sum(-1, keepdim=True)).to(dtype)


def model(zeros=False, dtype=torch.float64):
    start, transition = distributions(S, seed=1, dtype=dtype), distributions(S, S, seed=2, zeros=zeros, dtype=dtype)
    return HiddenMarkovModel(start, transition, distributions(S, K, seed=3, dtype=dtype))


def symbols(steps, rows=1, seed=0):
    return torch.randint(K, (steps, rows), generator=torch.Generator().manual_seed(seed))


def by_paths(hmm, observed):
    """Pr[x_1 … x_T, h_T = i] for every i, (S,): the sum over all paths."""
    paths = torch.tensor(list(itertools.product(range(S), repeat=len(observed))))  # (S^T, T)
    p = hmm.start[paths[:, 0]]
    for t, symbol in enumerate(observed):
        p = p * hmm.emission[paths[:, t], symbol]
        if t:
            p = p * hmm.transition[paths[:, t - 1], paths[:, t]]
    return torch.stack([p[paths[:, -1] == i].sum() for i in range(S)])


def tables(hmm):
    return [hmm.start, hmm.transition, hmm.emission]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_likelihood_posteriors_and_gradients_are_the_sums_over_all_paths(steps, zeros):
    hmm, x = model(zeros), symbols(steps, rows=2)
    filtered = hmm(x)
    gradients = torch.autograd.grad(filtered.log_likelihood.sum(), tables(hmm), materialize_grads=True)
    columns = x.T.tolist()
    expected = torch.stack([by_paths(hmm, column).sum().log() for column in columns])
    assert_close(filtered.log_likelihood, expected, rtol=1e-10, atol=1e-10)
    theirs = torch.autograd.grad(expected.sum(), tables(hmm), allow_unused=True, materialize_grads=True)
    assert_close(gradients, theirs, rtol=1e-10, atol=1e-10)
    for t in range(steps):
        joint = torch.stack([by_paths(hmm, column[: t + 1]) for column in columns])
        assert_close(filtered.posteriors[t], joint / joint.sum(-1, keepdim=True), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("eager", "poisoned")
def test_it_is_an_mi_cell_that_runs_compiled():
    hmm, x = model(), symbols(6, rows=2)
    assert isinstance(hmm.cell.integrator, Hadamard)
    state = hmm.cell.seen(hmm.start * hmm.emission.T[x[0]], 0.0)
    xs = nn.functional.one_hot(x[1:], K).double()
    runs = [scan(hmm.cell, xs, state, engine=engine)[1].log_likelihood for engine in ("loop", "fused")]
    assert_close(*runs, rtol=1e-10, atol=1e-10)
    assert_close(*(torch.autograd.grad(run.sum(), tables(hmm), retain_graph=True) for run in runs))


def test_an_mi_rnn_that_starts_at_the_first_states_distribution_has_another_likelihood():
    """The trap: h_0 is the distribution before the first symbol's step. From there α ⊙ Wx ⊙ Uh alone is the model."""
    hmm, x = model(), symbols(5)
    cell = RNNCell(
        K, S, lambda *sizes: MultiplicativeIntegration(*sizes, 1.0, 0.0, 0.0, None), activation=nn.Identity()
    ).double()
    cell.integrator.x_projection.weight.data = hmm.emission.data
    cell.integrator.z_projection.weight.data = hmm.transition.data.T
    xs = nn.functional.one_hot(x, K).double()
    before = torch.linalg.solve(hmm.transition.T, hmm.start)  # carried through the transition it is the start
    right, wrong = (scan(cell, xs, HiddenState(h[None]))[1].h.sum() for h in (before, hmm.start))
    likelihood = hmm.log_likelihood(x).exp().squeeze()
    assert_close(right, likelihood, rtol=1e-10, atol=1e-10)
    assert abs(wrong / likelihood - 1) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_thousand_symbols_do_not_underflow(dtype):
    """Against the forward algorithm in logarithms."""
    hmm, x = model(dtype=dtype), symbols(10_000)
    with torch.no_grad():
        log_likelihood = hmm.log_likelihood(x)
        start, transition, emission = (table.double().log() for table in tables(hmm))
        joint = start
        for t, [symbol] in enumerate(x.tolist()):
            joint = (torch.logsumexp(joint[:, None] + transition, 0) if t else joint) + emission[:, symbol]
    assert_close(log_likelihood[0].double(), joint.logsumexp(0), rtol={torch.float32: 1e-5}.get(dtype, 1e-10), atol=0)
    assert log_likelihood < -10_000


def test_gradients_are_finite_at_length():
    hmm = model(dtype=torch.float32)
    gradients = torch.autograd.grad(hmm.log_likelihood(symbols(2000)).sum(), tables(hmm))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_table_times_its_gradient_is_the_expected_counts():
    """Each is as often used as there are symbols; a step of Baum and Welch with them never lowers the likelihood."""
    hmm, x = model(), symbols(40, rows=5)
    likelihoods = []
    for _ in range(20):
        likelihood = hmm.log_likelihood(x).sum()
        gradients = torch.autograd.grad(likelihood, tables(hmm))
        likelihoods.append(likelihood.detach())
        with torch.no_grad():
            counts = [table * gradient for table, gradient in zip(tables(hmm), gradients, strict=True)]
            assert_close([count.sum().item() for count in counts], [5.0, 5.0 * 39, 5.0 * 40])
            for table, count in zip(tables(hmm), counts, strict=True):
                table.copy_(count / count.sum(-1, keepdim=True))
    gains = torch.stack(likelihoods).diff()
    assert (gains > -1e-9).all()
    assert gains.sum() > 1


def test_an_impossible_sequence_has_a_likelihood_of_zero():
    eye = torch.eye(2)
    hmm = HiddenMarkovModel(eye[0], eye, eye)  # says 0 for ever
    x = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 0]])
    assert_close(hmm.log_likelihood(x).detach(), torch.tensor([0.0, -math.inf, -math.inf]))
    assert not hmm(x).posteriors.isnan().any()
    hmm.log_likelihood(x)[0].backward()
    counts = [1.0, 0.0], [[2.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]  # the others leave it alone
    for table, expected in zip((hmm.start, hmm.transition, hmm.emission), counts, strict=True):
        assert_close(table.grad, torch.tensor(expected))


@pytest.mark.parametrize(("dtype", "emission"), [(torch.float16, 2e-5), (torch.float32, 1e-39)])
def test_a_symbol_may_be_rarer_than_the_smallest_normal_number(dtype, emission):
    table = torch.tensor([[emission, 1 - emission]], dtype=dtype)
    hmm = HiddenMarkovModel(torch.ones(1, dtype=dtype), torch.ones(1, 1, dtype=dtype), table)
    log_likelihood, posteriors = hmm(torch.zeros(1, 1, dtype=torch.int64))
    assert_close(log_likelihood.double(), table[0, :1].double().log(), rtol=1e-3, atol=0)
    assert_close(posteriors, torch.ones_like(posteriors))


def test_copies_and_state_dicts_keep_the_model():
    hmm, other, x = model(), model(zeros=True), symbols(6)
    other.load_state_dict(hmm.state_dict())
    for same in (other, copy.deepcopy(hmm)):
        assert_close(same.log_likelihood(x), hmm.log_likelihood(x), rtol=0, atol=0)
    assert [tuple(p.shape) for p in hmm.parameters()] == [(S,), (S, K), (S, S)]


half, even = torch.full((2,), 0.5), torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((even, even, even), r"start has the shape \(2, 2\), expected \(S,\)$"),
        ((half, even[:1], even), r"transition has the shape \(1, 2\), expected \(S, S\) with S = 2, as start has it"),
        ((half, torch.full((2, 3), 1 / 3), even), r"transition has the shape \(2, 3\), expected \(S, S\)"),
        ((half, even, torch.ones(3, 1)), r"emission has the shape \(3, 1\), expected \(S, K\) with S = 2"),
        ((half, even, torch.ones(2, 0)), r"emission has the shape \(2, 0\), expected \(S, K\)"),
        ((torch.tensor([0, 1]), even, even), "start is torch.int64, expected floating-point numbers"),
        ((half, even.double(), even), "transition is torch.float64, expected floating-point numbers, all of one dtype"),
        ((half, even, torch.tensor([[0.5, 0.5], [1.5, -0.5]])), "emission has -0.5, expected probabilities"),
        ((half, even, torch.full((2, 2), math.nan)), "emission has nan, expected probabilities"),
        ((half / 2, even, even), "start sums to 0.5, expected 1$"),
        ((half, even, torch.tensor([[0.5, 0.5], [0.5, 0.4]])), "row 1 of emission sums to 0.9, expected 1$"),
        ((half, torch.tensor([[0.9, 0.5], [0.1, 0.5]]), even), "row 0 of transition sums to 1.4, .* to be transposed"),
    ],
)
def test_what_is_no_model_is_refused(given, message):
    with pytest.raises(MultintError, match=message):
        HiddenMarkovModel(*given)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([0, 1]), r"symbols: got the shape \(2,\), expected \(T, B\)"),
        (torch.empty(0, 2, dtype=torch.long), r"got the shape \(0, 2\)"),
        ([[0]], "got a list"),
        (torch.zeros(2, 1), "symbols are torch.float32, expected whole numbers"),
        (torch.tensor([[0], [4]]), "symbols are from 0 to 4, expected from 0 to 3"),
        (torch.tensor([[-1], [1]]), "symbols are from -1 to 1"),
    ],
)
def test_other_symbols_are_refused(x, message):
    with pytest.raises(MultintError, match=message):
        model().log_likelihood(x)
