"""Published equations and models as special cases, each against a form written out by hand."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from multint import (
    Additive,
    Bilinear,
    Concat,
    Conditional,
    Diagonal,
    Gated,
    GRUCell,
    Hadamard,
    Hypernetwork,
    LowRank,
    LSTMCell,
    MultintError,
    MultiplicativeIntegration,
    Pairwise,
    RNNCell,
    scan,
)
from multint.cells import HiddenState, LSTMState
from multint.integrators import Krause, Normalised, ThroughOf, rank
from tests.catalogue import normal, randomise

X, Z, OUT = 7, 5, 3
x, z = normal(6, X), normal(6, Z, seed=2)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def share(source, *targets):
    """Give the targets the source's projections."""
    for target in targets:
        target.x_projection.weight.data = source.x_projection.weight.data
        target.z_projection.weight.data = source.z_projection.weight.data


def test_additive_and_concat_are_a_linear_layer_on_both_streams():
    f, g = randomise(Additive(X, Z, OUT).double()), Concat(X, Z, OUT).double()
    A = torch.cat([f.x_projection.weight, f.z_projection.weight], dim=1).data
    g.projection.weight.data, g.bias.data = A, f.bias.data
    both = torch.cat([x, z], dim=-1)
    exact(f(x, z), nn.functional.linear(both, A, f.bias))
    exact(g(x, z), f(x, z))


def test_mi_with_alpha_0_and_betas_1_is_additive():
    f, g = MultiplicativeIntegration(X, Z, OUT, 0.0, 1.0, 1.0, 0.3).double(), Additive(X, Z, OUT, bias=0.3).double()
    share(f, g)
    exact(f(x, z), g(x, z))


def test_equation_3_is_equation_4_with_alpha_1_and_another_bias():
    f = randomise(Hadamard(X, Z, OUT, x_bias=0.0, z_bias=0.0).double())
    g = MultiplicativeIntegration(X, Z, OUT).double()
    share(f, g)
    g.alpha.data.fill_(1.0)
    g.beta1.data, g.beta2.data = f.x_bias.data, f.z_bias.data
    g.bias.data = f.bias.data + f.x_bias.data * f.z_bias.data
    exact(g(x, z), f(x, z))


def test_beta1_multiplies_the_state_and_beta2_the_input():
    f = MultiplicativeIntegration(X, Z, OUT, alpha=0.0, beta1=1.0, beta2=0.0).double()
    exact(f(x, z), z @ f.z_projection.weight.T)


def test_pairwise_of_two_streams_is_mi():
    f, g = randomise(MultiplicativeIntegration(X, Z, OUT).double()), Pairwise((X, Z), OUT).double()
    g.projections[0].weight.data, g.projections[1].weight.data = f.x_projection.weight.data, f.z_projection.weight.data
    g.alphas[0].data, g.betas[0].data, g.betas[1].data = f.alpha.data, f.beta2.data, f.beta1.data
    g.bias.data = f.bias.data
    exact(g(x, z), f(x, z))
    dense, W = f.terms(), g.terms().W[0, 1]
    exact((W.transpose(1, 2), g.terms().U[1], g.terms().U[0], g.terms().b), tuple(dense))


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("bias", [0.5, None])
def test_pairwise_equals_its_dense_form_for_any_number_of_streams(k, bias):
    sizes = (X, Z, 4, 6)[:k]
    f = randomise(Pairwise(sizes, OUT, bias=bias).double())
    streams = [normal(6, n, seed=n) for n in sizes]
    terms = f.terms()
    assert [tuple(W.shape) for W in terms.W.values()] == [(OUT, m, n) for m, n in itertools.combinations(sizes, 2)]
    exact(terms(*streams), f(*streams))
    ours = torch.autograd.grad(terms(*streams).square().sum(), list(f.parameters()))
    exact(ours, torch.autograd.grad(f(*streams).square().sum(), list(f.parameters())))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pairwise_is_the_sum_over_its_pairs(k):
    """Σ_{i<j} α_ij ⊙ W_i x_i ⊙ W_j x_j + Σ_i β_i ⊙ W_i x_i + b, one output and one pair at a time."""
    sizes = (X, Z, 4, 6)[:k]
    f = randomise(Pairwise(sizes, OUT).double())
    streams = [normal(6, n, seed=n) for n in sizes]
    projected = [s @ p.weight.T for s, p in zip(streams, f.projections, strict=True)]
    expected = torch.zeros(6, OUT).double()
    for row, o in itertools.product(range(6), range(OUT)):
        pairs = itertools.combinations([p[row, o] for p in projected], 2)
        expected[row, o] = f.bias[o] + sum(a[o] * p * q for a, (p, q) in zip(f.alphas, pairs, strict=True))
        expected[row, o] += sum(b[o] * p[row, o] for b, p in zip(f.betas, projected, strict=True))
    exact(f(*streams), expected)


def test_pairwise_names_streams_that_do_not_fit():
    f = Pairwise((X, Z, 4), OUT).double()
    with pytest.raises(MultintError, match="got 2 streams, expected 3"):
        f(x, z)
    with pytest.raises(MultintError, match=r"stream 2 has 5 features, expected 4 \(features\[2\]\)"):
        f(x, z, z)


def test_a_normalised_additive_block_is_layer_normalisation_of_each_projection():
    """Ba et al. 2016: LN(Wx; γ1) + LN(Uz; γ2) + b."""
    f = randomise(Normalised(X, Z, OUT, integrator=Additive).double())
    wx, uz = f.integrator.x_projection, f.integrator.z_projection
    expected = f.integrator.bias
    for stream, part in ((x, wx), (z, uz)):
        p = stream @ part.weight.T
        centred = p - p.mean(-1, keepdim=True)
        expected = expected + part.norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    exact(f(x, z), expected)


def test_diagonal_starts_at_the_identity():
    torch.testing.assert_close(Diagonal(X, Z, X).double()(x, z), x, rtol=0, atol=0)


def test_a_linear_hypernetwork_is_bilinear():
    f = randomise(Hypernetwork(X, Z, OUT, features=6, network=nn.Linear).double())
    A, a = f.scale * f.network.weight, f.scale * f.network.bias
    W, U, V, b = f.head.terms()
    g = Bilinear(X, Z, OUT).double()
    g.interaction.weight.data = torch.einsum("ogj,gi->oij", W, A).data
    g.lower.z_projection.weight.data = (U @ A).data
    g.lower.x_projection.weight.data = (V + torch.einsum("ogj,g->oj", W, a)).data
    g.lower.bias.data = (b + U @ a).data
    exact(g(x, z), f(x, z))


def test_bilinear_alone_is_torch_bilinear():
    f, g = nn.Bilinear(X, Z, OUT).double(), Bilinear(X, Z, OUT, z_term=False, x_term=False).double()
    g.interaction.weight.data, g.lower.bias.data = f.weight.data.transpose(1, 2), f.bias.data
    exact(g(x, z), f(x, z))


def test_bilinear_is_a_linear_hypernetwork_as_two_matrices():
    """One matrix writes the weights W'(z) = zᵀW + V, another the bias b'(z) = Uz + b, a layer for each row."""
    f = randomise(Bilinear(X, Z, OUT).double())
    W, U, V, b = f.terms()
    weights = nn.functional.linear(z, W.transpose(1, 2).flatten(0, 1), V.flatten()).view(6, OUT, X)
    biases = nn.functional.linear(z, U, b)
    exact(f(x, z), torch.func.vmap(nn.functional.linear)(x, weights, biases))


def test_film_is_diagonal():
    """Perez et al. 2018: γ(z) ⊙ x + β(z), where one linear layer gives γ and β."""
    f = randomise(Diagonal(X, Z, X).double())
    weight = torch.cat([f.scale_projection.weight, f.shift_projection.weight])
    gamma, beta = nn.functional.linear(z, weight, torch.cat([f.scale_bias, f.shift_bias])).chunk(2, -1)
    exact(f(x, z), gamma * x + beta)


def test_glu_is_gated():
    """Dauphin et al. 2017, where both streams are the same: one linear layer, of which a half gates the other."""
    f = randomise(Gated(X, X, OUT).double())
    weight = torch.cat([f.x_projection.weight, f.z_projection.weight])
    exact(f(x, x), nn.functional.glu(nn.functional.linear(x, weight, torch.cat([f.x_bias, f.z_bias]))))


def test_scaled_dot_product_attention_from_integrators():
    """Every query token meets every key token in a low-rank form, and the attention of it its value in a Hadamard."""
    D = 4
    queries, keys = normal(2, 6, X), normal(2, 9, Z, seed=2)
    score = LowRank(X, Z, 1, rank=D, z_term=False, x_term=False, bias=None).double()
    score.out_factor.weight.data.fill_(D**-0.5)
    mix = Hadamard(1, Z, OUT, bias=None).double()
    mix.x_projection.weight.data.fill_(1.0)
    pairs = queries.unsqueeze(2), keys.unsqueeze(1)  # (B, I, 1, X) and (B, 1, J, Z)
    attention = score(*pairs).softmax(dim=2)  # (B, I, J, 1)
    projected = queries @ score.x_factor.weight.T, keys @ score.z_factor.weight.T, keys @ mix.z_projection.weight.T
    exact(mix(attention, pairs[1]).sum(2), nn.functional.scaled_dot_product_attention(*projected))


def test_distmult_is_low_rank():
    """Yang et al. 2015: a triple (s, r, o) scores Σ_d e_s[d] w_r[d] e_o[d], here of all relations r at once."""
    entities, relations, D = 8, 3, 4
    f = LowRank(entities, entities, relations, rank=D, z_term=False, x_term=False, bias=None).double()
    f.z_factor.weight = f.x_factor.weight  # one embedding of the entities, and a symmetric score
    embedding, vectors = f.x_factor.weight.T, f.out_factor.weight
    s, o = torch.tensor([0, 3, 7]), torch.tensor([5, 3, 1])
    one_hot = torch.eye(entities, dtype=torch.float64)
    exact(f(one_hot[s], one_hot[o]), (embedding[s].unsqueeze(1) * vectors * embedding[o].unsqueeze(1)).sum(-1))


def test_the_ladder_networks_combinator_is_mi_and_a_stack_of_it():
    """The vanilla combinator of Pezeshki et al. 2016: a form for each pair of units (z̃, u), plus ω·σ of another."""
    linear = MultiplicativeIntegration(X, X, X)
    sigmoid = Conditional(X, X, X, X, 2, MultiplicativeIntegration, torch.sigmoid, gain=1)
    combinator = randomise((linear + sigmoid).double())
    inner, outer = sigmoid.layers
    for f in (linear, inner):  # each unit meets its own copy
        f.x_projection.weight.data, f.z_projection.weight.data = torch.eye(X).double(), torch.eye(X).double()
    outer.x_projection.weight.data = torch.eye(X).double()
    for absent in (outer.alpha, outer.beta1, outer.bias):
        absent.data.zero_()
    noisy, above = normal(6, X), normal(6, X, seed=2)
    first, second = (f.bias + f.beta2 * noisy + f.beta1 * above + f.alpha * noisy * above for f in (linear, inner))
    exact(combinator(noisy, above), first + outer.beta2 * second.sigmoid())


def test_without_interaction_and_context_it_is_a_linear_layer():
    """W = U = 0: the strict inclusion of Jayakumar et al. 2020."""
    f = randomise(Bilinear(X, Z, OUT).double())
    for name in f.z_weights:
        f.get_parameter(name).data.zero_()
    exact(f(x, z), nn.functional.linear(x, f.lower.x_projection.weight, f.lower.bias))


def mixed_derivative(f):
    """∂²f_o/∂z_i∂x_j at one point."""

    def z_jacobian(one_x):
        return torch.func.jacrev(lambda one_z: f(one_x, one_z))(z[0])

    return torch.func.jacrev(z_jacobian)(x[0])


@pytest.mark.parametrize("integrator", [MultiplicativeIntegration, Bilinear, LowRank, Hadamard])
def test_the_mixed_derivative_is_the_interaction(integrator):
    """∂²f/∂x∂z = W (Jayakumar et al. 2020), everywhere."""
    f = randomise(integrator(X, Z, OUT).double())
    assert f.terms().W.any()
    exact(mixed_derivative(f), f.terms().W)


def test_the_mixed_derivative_of_an_additive_block_and_of_a_relu_network_is_zero():
    """The network is piecewise linear in [x; z], so almost everywhere no stream changes what the other does."""
    network = randomise(Conditional(X, Z, OUT, integrator=None).double())
    assert torch.func.jacrev(network)(x[0], z[0]).any()
    for f in (network, randomise(Additive(X, Z, OUT).double())):
        torch.testing.assert_close(mixed_derivative(f), torch.zeros(OUT, Z, X).double(), rtol=0, atol=0)


# A((W_m x) ⊙ (U_m h)) + Vx + b: the multiplicative LSTM's map and, with other features between, the RNN's.
multiplicative = partial(ThroughOf, outer=Additive, inner=partial(Hadamard, bias=None))


def parts(f):
    """W_m, U_m, V, A and b."""
    inner, outer = f.inner, f.outer
    matrices = inner.x_projection, inner.z_projection, outer.x_projection, outer.z_projection
    return *(matrix.weight for matrix in matrices), outer.bias


@pytest.mark.parametrize("gates", [Krause, multiplicative])
def test_multiplicative_lstm_from_parts(gates):
    """Krause et al. 2016, the variant with the usual tanh candidate: m takes h's place in all gates."""
    cell = randomise(LSTMCell(X, 4, integrator=gates).double())
    W_m, U_m, V, A, bias = parts(cell.gates)
    xs, h, c = normal(5, 6, X), normal(6, 4, seed=3), normal(6, 4, seed=4)
    output, final = scan(cell, xs, LSTMState(h, c))
    for t in range(5):
        m = (xs[t] @ W_m.T) * (h @ U_m.T)
        i, f, g, o = (xs[t] @ V.T + m @ A.T + bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        exact(output[t], h)
    exact(final.c, c)


@pytest.mark.parametrize("written", ["by name", "by operator"])
def test_multiplicative_rnn_from_parts(written):
    """Sutskever et al. 2011: f_t = diag(W_fx x_t) W_fh h_{t−1} and h_t = tanh(W_hf f_t + W_hx x_t), with 3 factors."""

    def by_operator(x_features, z_features, out_features):
        inner = Hadamard(x_features, z_features, 3, bias=None)
        return Additive(x_features, 3, out_features) @ inner

    factory = by_operator if written == "by operator" else partial(multiplicative, inner_features=3)
    cell = randomise(RNNCell(X, Z, factory).double())
    W_fx, W_fh, W_hx, W_hf, bias = parts(cell.integrator)
    xs, h = normal(5, 6, X), z
    output, _ = scan(cell, xs, HiddenState(h))
    for t in range(5):
        factors = torch.stack([torch.diag(W_fx @ x_t) @ W_fh @ h_b for x_t, h_b in zip(xs[t], h, strict=True)])
        h = (factors @ W_hf.T + xs[t] @ W_hx.T + bias).tanh()
        exact(output[t], h)


def test_mi_has_slices_of_rank_one():
    """W[o] = α_o U[o]ᵀ V[o]: the tensor of a multiplicative RNN with a factor for every output, and P = diag(α)."""
    mi = randomise(MultiplicativeIntegration(X, Z, OUT).double())
    W = mi.terms().W
    assert torch.linalg.matrix_rank(W).tolist() == [1] * OUT
    f = LowRank(X, Z, OUT, rank=OUT).double()
    f.x_factor.weight.data, f.z_factor.weight.data = mi.x_projection.weight.data, mi.z_projection.weight.data
    f.out_factor.weight.data = mi.alpha.diag().data
    exact(W, f.terms().W)


def test_a_multiplicative_rnns_slices_share_their_factors():
    """W[o] = Rᵀ diag(P[o]) Q: the pseudo-inverses of R and Q, the same for all, make every slice diagonal."""
    f = randomise(multiplicative(X, Z, 6, inner_features=4).double())
    assert rank(f) == (4, 4, 4)
    W_m, U_m, _, A, _ = parts(f)
    W = f.terms().W
    assert torch.linalg.matrix_rank(W).tolist() == [4] * 6
    exact(torch.linalg.pinv(U_m.T) @ W @ torch.linalg.pinv(W_m), torch.diag_embed(A))
    # Any tensor's slices have no such basis: those of a second-order RNN are not diagonal in it.
    other = torch.linalg.pinv(U_m.T) @ randomise(Bilinear(X, Z, 6).double()).terms().W @ torch.linalg.pinv(W_m)
    assert (other - torch.diag_embed(other.diagonal(dim1=1, dim2=2))).abs().max() > 0.1


def test_a_second_order_rnn_is_bilinear():
    """h'_i = tanh(Σ_jk T[i, j, k] h_j x_k), with a tensor of full rank (Goudreau et al. 1994)."""
    cell = randomise(RNNCell(X, Z, partial(Bilinear, z_term=False, x_term=False, bias=None)).double())
    T = cell.integrator.terms().W
    assert rank(cell.integrator) == (Z, Z, X)
    xs, h = normal(5, 6, X), z
    output, _ = scan(cell, xs, HiddenState(h))
    for t in range(5):
        h = torch.stack([torch.stack([h_b @ T_i @ x_t for T_i in T]) for x_t, h_b in zip(xs[t], h, strict=True)]).tanh()
        exact(output[t], h)
    for term in cell.integrator.terms()[1:]:
        assert not term.any()


def test_multiplicative_rnn_is_low_rank_without_the_state_term():
    """Sutskever et al. 2011: the same map as an additive one through a Hadamard one."""
    f = randomise(LowRank(X, Z, OUT, rank=4, z_term=False).double())
    g = Additive(X, 4, OUT).double() @ Hadamard(X, Z, 4, bias=None).double()
    g.inner.x_projection.weight.data, g.inner.z_projection.weight.data = f.x_factor.weight.data, f.z_factor.weight.data
    g.outer.z_projection.weight.data = f.out_factor.weight.data
    g.outer.x_projection.weight.data, g.outer.bias.data = f.lower.x_projection.weight.data, f.lower.bias.data
    exact(g(x, z), f(x, z))


def test_mi_lstm_is_the_papers():
    """Wu et al. 2016, A.1, gate by gate."""
    cell = randomise(LSTMCell(X, 4).double())
    h, c = normal(6, 4, seed=3), normal(6, 4, seed=4)
    f = cell.gates

    def gate(name):
        rows = slice(4 * cell.gate_names.index(name), 4 * cell.gate_names.index(name) + 4)
        wx, uh = x @ f.x_projection.weight[rows].T, h @ f.z_projection.weight[rows].T
        return f.alpha[rows] * wx * uh + f.beta1[rows] * uh + f.beta2[rows] * wx + f.bias[rows]

    new_c = gate("i").sigmoid() * gate("g").tanh() + gate("f").sigmoid() * c
    state = cell(x, LSTMState(h, c))
    exact(state.c, new_c)
    exact(state.h, gate("o").sigmoid() * new_c.tanh())


@pytest.mark.parametrize("reset_after", [False, True])
def test_mi_gru_is_the_papers(reset_after):
    """Wu et al. 2016, A.2, with our z = 1 − theirs; reset after the product: r ⊙ Uh in U(r ⊙ h)'s place."""
    cell = randomise(GRUCell(X, 4, reset_after=reset_after, recurrent_bias=None).double())
    h = normal(6, 4, seed=3)
    r, update = cell.gates(x, h).sigmoid().chunk(2, -1)
    f = cell.candidate
    wx = x @ f.x_projection.weight.T
    uh = r * (h @ f.z_projection.weight.T) if reset_after else (r * h) @ f.z_projection.weight.T
    n = (f.alpha * wx * uh + f.beta1 * uh + f.beta2 * wx + f.bias).tanh()
    exact(cell(x, HiddenState(h)).h, (1 - update) * n + update * h)


@pytest.mark.parametrize(
    ("activation", "slope"),
    [(torch.tanh, lambda h: 1 - h**2), (nn.Identity(), torch.ones_like)],
    ids=["tanh", "linear"],
)
def test_the_jacobian_of_an_mi_rnn_is_a_product_of_one_for_each_step(activation, slope):
    """∂h_t/∂h_{t−1} = diag(φ'(·)) diag(α ⊙ Wx_t + β1) U; the paper's eq. 6 writes its transpose."""
    cell = randomise(RNNCell(X, Z, activation=activation).double())
    f = cell.integrator
    xs = normal(4, 1, X)
    output, _ = scan(cell, xs, HiddenState(z[:1]))
    product = torch.eye(Z).double()
    for t in range(4):
        gain = f.alpha * (f.x_projection.weight @ xs[t, 0]) + f.beta1
        one = torch.diag(slope(output[t, 0])) @ torch.diag(gain) @ f.z_projection.weight
        before = output[t - 1] if t else z[:1]
        exact(torch.func.jacrev(lambda h, x: cell.step(x, HiddenState(h)).h)(before, xs[t])[0, :, 0], one)
        product = one @ product
        exact(torch.func.jacrev(lambda h, x: scan(cell, x, HiddenState(h))[1].h)(z[:1], xs[: t + 1])[0, :, 0], product)
