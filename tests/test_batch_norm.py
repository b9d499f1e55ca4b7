"""Recurrent batch normalisation: the equations, the statistics of steps and of the population, and what is refused."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from multint import GRU, LSTM, RNN, Additive, GRUCell, LowRank, LSTMCell, MultiplicativeIntegration, Recurrent, RNNCell
from multint.errors import EngineError, MultintError, OptionError
from multint.integrators import Normalised, RecurrentBatchNorm, population_statistics
from tests.catalogue import normal, randomise

X, H = 3, 5
EPS = 1e-5
LENGTHS = torch.tensor([6, 4, 6, 2, 5])
T, B = int(LENGTHS.max()), len(LENGTHS)

norm = partial(RecurrentBatchNorm, max_steps=4)
memory_norm = partial(norm, bias=True)
additive, multiplicative = (Normalised.of(f, norm=norm) for f in (Additive, MultiplicativeIntegration))


def stack(cell=LSTMCell, integrator=additive, **settings):
    of_cell = {"memory_norm": memory_norm} if cell is LSTMCell else {}
    torch.manual_seed(0)
    return randomise(Recurrent(X, H, partial(cell, integrator=integrator, **of_cell), **settings).double())


def inputs(*shape, seed=1):
    return normal(*shape, X, seed=seed).double()


def trained(rnn, passes=2):
    """After some passes in training, whose statistics it has."""
    with torch.no_grad():
        for seed in range(passes):
            rnn.train()(inputs(T, B, seed=seed), lengths=LENGTHS)
    return rnn.eval()


# ---- An independent loop, written from the equations: a list of the rows that still go on at every step.


class Moments:
    """The statistics of each place that is normalised, by step: of a batch, kept for others to read."""

    def __init__(self, rows=None):
        self.seen, self.fixed = {}, rows

    def __call__(self, place, t, p, gamma, beta=0.0):
        """γ (p − mean) / √(var + ε) + β."""
        self.seen.setdefault((place, t), []).append(p.detach())
        rows = p if self.fixed is None else torch.cat(self.fixed[place, t])
        mean = sum(rows) / len(rows)
        variance = sum((row - mean) ** 2 for row in rows) / len(rows)
        return gamma * (p - mean) / (variance + EPS).sqrt() + beta


def additively(f, wx, uz):
    return wx + uz + f.bias


def multiplicatively(f, wx, uz):
    return f.alpha * wx * uz + f.beta1 * uz + f.beta2 * wx + f.bias


def meet(name, outer, x, z, t, moments, form):
    f = outer.integrator
    wx, uz = x @ f.x_projection.weight.T, z @ f.z_projection.weight.T
    wx = moments(f"{name} x", t, wx, f.x_projection.norm.weight)
    uz = moments(f"{name} z", t, uz, f.z_projection.norm.weight)
    return form(f, wx, uz)


def lstm_step(cell, x, h, c, t, moments, form):
    i, f, g, o = meet("gates", cell.gates, x, h, t, moments, form).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    read = moments("c", t, c, cell.memory_norm.weight, cell.memory_norm.bias)
    return torch.sigmoid(o) * torch.tanh(read), c


def rnn_step(cell, x, h, c, t, moments, form):
    return torch.tanh(meet("map", cell.integrator, x, h, t, moments, form)), c


def gru_step(cell, x, h, c, t, moments, form):
    r, z = torch.sigmoid(meet("gates", cell.gates, x, h, t, moments, form)).chunk(2, -1)
    n = torch.tanh(meet("candidate", cell.candidate, x, r * h, t, moments, form))
    return (1 - z) * n + z * h, c


def by_equations(step, form, cell, sequences, moments):
    """Sequences (T_i, X) of different lengths; their outputs, each with zeros up to T."""
    h = [x.new_zeros(H) for x in sequences]
    c, outputs = list(h), [[] for _ in sequences]
    for t in range(max(map(len, sequences))):
        on = [i for i, x in enumerate(sequences) if len(x) > t]
        x, old_h, old_c = (torch.stack(of) for of in zip(*((sequences[i][t], h[i], c[i]) for i in on), strict=True))
        new_h, new_c = step(cell, x, old_h, old_c, t, moments, form)
        for k, i in enumerate(on):
            h[i], c[i] = new_h[k], new_c[k]
            outputs[i].append(new_h[k])
    return torch.stack([torch.stack([*o, *[torch.zeros_like(h[0])] * (T - len(o))]) for o in outputs], 1)


FORMS = [
    (LSTMCell, lstm_step, additive, additively),
    (LSTMCell, lstm_step, multiplicative, multiplicatively),
    (GRUCell, gru_step, additive, additively),
    (RNNCell, rnn_step, multiplicative, multiplicatively),
]


@pytest.mark.parametrize(("cell", "step", "integrator", "form"), FORMS, ids=["lstm", "mi-lstm", "gru", "mi-rnn"])
def test_training_is_the_equations(cell, step, integrator, form):
    rnn, x = stack(cell, integrator), inputs(T, B).requires_grad_()
    output, _ = rnn(x, lengths=LENGTHS)
    sequences = [x[:length, i] for i, length in enumerate(LENGTHS)]
    expected = by_equations(step, form, rnn.directions[0].cell, sequences, Moments())
    assert_close(output, expected)
    cotangent, leaves = normal(T, B, H, seed=2).double(), [x, *rnn.parameters()]
    assert_close(torch.autograd.grad(output, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent))


def test_all_rows_count_without_lengths_and_a_full_length_says_the_same():
    x = inputs(T, B)
    outputs = [stack()(x, lengths=lengths)[0] for lengths in (None, torch.full((B,), T))]
    full = [x[:, i] for i in range(B)]
    assert_close(outputs[0], outputs[1])
    assert_close(outputs[0], by_equations(lstm_step, additively, stack().directions[0].cell, full, Moments()))


def test_both_directions_begin_where_a_sequence_does():
    rnn, x = stack(bidirectional=True), inputs(T, B)
    output, (h, _) = rnn(x, lengths=LENGTHS)
    for backward, part in enumerate(output.chunk(2, -1)):
        cell = rnn.directions[backward].cell
        sequences = [x[:n, i].flip(0) if backward else x[:n, i] for i, n in enumerate(LENGTHS)]
        expected = by_equations(lstm_step, additively, cell, sequences, Moments())
        assert_close(h[backward], torch.stack([expected[n - 1, i] for i, n in enumerate(LENGTHS)]))
        if backward:
            turned = [torch.cat([expected[:n, i].flip(0), expected[n:, i]]) for i, n in enumerate(LENGTHS)]
            expected = torch.stack(turned, 1)
        assert_close(part, expected)


def test_padding_changes_nothing_in_evaluation():
    """Neither how much of it there is, nor the other sequences of the batch."""
    rnn, x = trained(stack(num_layers=2, bidirectional=True)), inputs(T, B)
    output, state = rnn(x, lengths=LENGTHS)
    for i, length in enumerate(LENGTHS):
        alone, last = rnn(x[:length, i])
        assert_close(output[:length, i], alone)
        assert_close([field[:, i] for field in state], list(last))


# ---- Statistics.


def test_population_statistics_are_those_of_all_rows():
    """In whatever batches they come. A network without recurrent weights is the same in all of them."""
    rnn, batches = stack(dropout=0.5, num_layers=2), [(inputs(T, B, seed=s), LENGTHS.roll(s)) for s in (3, 4)]
    trained(rnn).train()
    first = rnn.directions[0].cell
    first.gates.integrator.z_projection.weight.data.zero_()
    momenta = {part.momentum for part in rnn.modules() if isinstance(part, RecurrentBatchNorm)}
    moments = Moments()
    with population_statistics(rnn):
        for x, lengths in batches:
            assert not rnn(x, lengths=lengths)[0].requires_grad
            sequences = [x[:n, i] for i, n in enumerate(lengths)]
            with torch.no_grad():
                by_equations(lstm_step, additively, first, sequences, moments)
    assert all(part.training for part in rnn.modules())
    assert momenta == {part.momentum for part in rnn.modules() if isinstance(part, RecurrentBatchNorm)} == {0.1}
    of_first = {"gates x": first.gates.integrator.x_projection.norm, "c": first.memory_norm}
    for place, of in of_first.items():
        for t in range(4):  # the last of which is of all steps from there on
            later = [t] if t < 3 else range(3, T)
            rows = torch.cat([row for s in later for row in moments.seen[place, s]])
            assert_close(of.count[t], torch.tensor(len(rows)).double())
            assert_close(of.mean[t], rows.mean(0))
            assert_close(of.variance[t], rows.var(0, correction=0))


def test_evaluation_takes_the_populations_statistics_step_by_step():
    """They are the batch's own where one batch is the population: then both modes give the same."""
    x, rnn = inputs(T, B), stack(integrator=Normalised.of(Additive, norm=partial(norm, max_steps=T)))
    cell = rnn.directions[0].cell
    cell.memory_norm = memory_norm(H, max_steps=T).double()
    with population_statistics(rnn):
        rnn(x, lengths=LENGTHS)
    assert_close(rnn.eval()(x, lengths=LENGTHS)[0], rnn.train()(x, lengths=LENGTHS)[0])


def test_steps_beyond_those_that_were_seen_take_the_last_statistics():
    x = inputs(T, B)
    kept, few = (stack(RNNCell, Normalised.of(Additive, norm=partial(norm, max_steps=n))) for n in (100, 2))
    for rnn in (kept, few):
        with population_statistics(rnn):
            rnn(x[:2])
    assert_close(kept.eval()(x)[0], few.eval()(x)[0])
    norms = [f.directions[0].cell.integrator.integrator.x_projection.norm for f in (kept, few)]
    assert [int((of.count > 0).sum()) for of in norms] == [2, 2]


def test_training_remembers_each_pass_with_less_weight():
    rnn = stack(RNNCell)
    of = rnn.directions[0].cell.integrator.integrator.x_projection.norm
    products, weights = [], []
    for seed, lengths in ((1, LENGTHS), (2, LENGTHS.clamp(max=3)), (3, LENGTHS)):
        x = inputs(T, B, seed=seed)
        rnn(x, lengths=lengths)
        weights = [[0.9 * w for w in of_step] for of_step in weights] or [[], []]
        for t, kept in enumerate(weights):
            rows = x[t, lengths > t] @ rnn.directions[0].cell.integrator.integrator.x_projection.weight.detach().T
            products.append((t, rows))
            kept += [1.0] * len(rows)
    for t, kept in enumerate(weights):
        rows, weight = torch.cat([rows for at, rows in products if at == t]), torch.tensor(kept).double().unsqueeze(1)
        mean = (weight * rows).sum(0) / weight.sum()
        assert_close(of.mean[t], mean)
        assert_close(of.variance[t], (weight * (rows - mean) ** 2).sum(0) / weight.sum())


def test_a_failed_estimate_leaves_the_old_one():
    rnn = trained(stack())
    before = copy.deepcopy(rnn.state_dict())
    for batches, message in (([], "no batch has passed"), ([inputs(T, B, seed=7), inputs(T, 1)], "one sequence")):
        with pytest.raises(MultintError, match=message), population_statistics(rnn):
            list(map(rnn, batches))
    assert_close(rnn.state_dict(), before)
    assert not any(part.training for part in rnn.modules())
    with pytest.raises(OptionError, match="LSTM has no RecurrentBatchNorm"), population_statistics(LSTM(X, H)):
        pass


def test_a_sequence_that_goes_on_alone_and_steps_without_any_have_finite_gradients():
    x, rnn = inputs(T, 2).requires_grad_(), stack()
    output, _ = rnn(x, lengths=torch.tensor([5, 2]))
    found = torch.autograd.grad(output.square().sum(), [x, *rnn.parameters()])
    assert all(gradient.isfinite().all() for gradient in found)
    of = rnn.directions[0].cell.memory_norm
    assert_close(of.count[:3], torch.tensor([2.0, 2.0, 0.0]).double(), msg="one row has no variance")


def test_a_sequence_longer_than_the_others_spoils_no_step_of_evaluation():
    """The steps that it alone has reached take the last statistics that there are."""
    longest, shorter = (stack(RNNCell, Normalised.of(Additive, norm=partial(norm, max_steps=9))) for _ in range(2))
    x = inputs(T, B)
    with population_statistics(longest):
        longest(x, lengths=torch.tensor([6, 3, 3, 2, 3]))
    with population_statistics(shorter):
        shorter(x[:3], lengths=torch.tensor([3, 3, 3, 2, 3]))
    assert_close(longest.eval()(x)[0], shorter.eval()(x)[0])


def test_replicas_keep_statistics_of_their_own():
    """As those of DataParallel, which run at once and share what is no tensor and no module."""
    rnn = stack(RNNCell).float()
    replicas = [replica(rnn) for _ in range(2)]
    norms = [next(part for part in one.modules() if isinstance(part, RecurrentBatchNorm)) for one in replicas]
    first, alone = inputs(T, B).float(), replica(rnn)

    def meanwhile(*_):
        handle.remove()
        replicas[1](inputs(T, B, seed=2).float())

    handle = norms[0].register_forward_hook(meanwhile)
    replicas[0](first)
    alone(first)
    expected = next(part for part in alone.modules() if isinstance(part, RecurrentBatchNorm))
    assert_close(dict(norms[0].named_buffers()), dict(expected.named_buffers()))


def replica(network):
    copies = {part: part._replicate_for_data_parallel() for part in network.modules()}
    for part, one in copies.items():
        for name, child in part._modules.items():
            setattr(one, name, copies.get(child))
        for name, value in [*part._parameters.items(), *part._buffers.items()]:
            setattr(one, name, None if value is None else value.detach().clone())
    return copies[network]


# ---- With the rest.


def test_saved_and_loaded_it_is_the_same():
    rnn = trained(stack(bidirectional=True))
    other = stack(bidirectional=True)
    other.load_state_dict(rnn.state_dict())
    x = inputs(T, B)
    expected = rnn(x, lengths=LENGTHS)
    for loaded in (other.eval(), copy.deepcopy(rnn)):
        assert_close(loaded(x, lengths=LENGTHS), expected)
    rnn.reset_parameters()
    fresh = rnn.directions[0].cell.memory_norm
    assert_close((fresh.count, fresh.weight), (torch.zeros(4).double(), torch.full((H,), 0.1).double()))


def test_it_goes_with_the_layers_other_settings():
    noise = {"zoneout": 0.1, "state_dropout": 0.2, "input_dropout": 0.2, "weight_drop": 0.2, "weight_noise": 0.1}
    rnn = stack(GRUCell, Normalised.of(LowRank, norm=norm, rank=2), learnt_state=True, num_layers=2, **noise)
    output, _ = rnn(inputs(T, B), lengths=LENGTHS)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in rnn.parameters())
    # With one statistic for all steps, it may be whatever step.
    steady = Normalised.of(Additive, norm=partial(norm, max_steps=1))
    rnn = RNN(X, H, integrator=steady, bidirectional=True).double()
    rnn(inputs(T, B), lengths=LENGTHS, reset=torch.eye(T, B, dtype=torch.bool))
    whole = inputs(4, B)
    rnn = trained(RNN(X, H, integrator=steady).double())
    halves = rnn(whole[:2])
    assert_close(torch.cat([halves[0], rnn(whole[2:], halves[1])[0]]), rnn(whole)[0])


def test_it_is_refused_by_fused_and_auto_tells_why():
    x, reason = inputs(T, B), "fused: RecurrentBatchNorm: the rows of a batch see each other"
    rnn = stack(engine="fused", num_layers=2)
    for engine_call in (rnn, rnn.precompile):
        with pytest.raises(EngineError, match=reason):
            engine_call(x)
    rnn.engine = "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn(x)
    assert [(e.engine, e.reason.startswith(reason)) for e in rnn.explain()] == [("loop", True)] * 2


class Whole(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.compiles
def test_it_is_exported_for_a_fixed_length():
    network, x = Whole(trained(stack())), inputs(3, B)
    rows = torch.export.export(network, (x,), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))
    other = inputs(3, B + 2, seed=9)
    assert_close(rows.module()(other), network(other))
    with pytest.raises(EngineError, match="cannot be exported with a free length"):
        torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def test_under_autocast_the_statistics_are_in_the_parameters_dtype():
    rnn = LSTM(X, H, integrator=additive, memory_norm=memory_norm)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = rnn(inputs(T, B).float(), lengths=LENGTHS)
    assert output.dtype == torch.bfloat16
    of = rnn.directions[0].cell.gates.integrator.x_projection.norm
    assert {buffer.dtype for buffer in of.buffers()} == {torch.float32}
    x = inputs(T, B)[0].float()
    assert_close(of.mean[0], (x @ rnn.directions[0].cell.gates.integrator.x_projection.weight.T).mean(0), **ROUGH)


ROUGH = {"rtol": 0.02, "atol": 0.02}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RecurrentBatchNorm(0), "features is 0"),
        (lambda: RecurrentBatchNorm(3, max_steps=0), "max_steps is 0"),
        (lambda: RecurrentBatchNorm(3, momentum=1.0), "momentum is 1.0"),
        (lambda: RecurrentBatchNorm(3, eps=0.0), "eps is 0.0, expected more than 0"),
        (lambda: RecurrentBatchNorm(3)(torch.ones(4, 3)), "there is no step in time here"),
        (lambda: RNNCell(X, H, additive)(torch.ones(4, X)), "there is no step in time here"),
        (lambda: stack()(inputs(T, 1)), "there is one sequence in the batch, expected more in training"),
        (lambda: stack()(inputs(T, B), stack()(inputs(T, B))[1]), "RecurrentBatchNorm: got a state, expected none"),
        (lambda: stack()(inputs(T, B), reset=torch.zeros(T, B, dtype=torch.bool)), "got resets, expected none"),
        (lambda: GRU(X, H, integrator=additive), "reset_after is True .* expected reset_after=False"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(MultintError, match=message):
        call()
