"""The language model as a plain network: shapes, carried state, tying, initialisation, sampling."""

import pytest
import torch
from torch.testing import assert_close

from models import LanguageModel, Uniform, sample
from multint import Concat, LowRank, LSTMCell, MultintError, MultiplicativeIntegration, Recurrent, RNNCell, Swapped

V, H, T, B = 11, 6, 7, 3


def network(embedding_size=5, cell=LSTMCell, **settings):
    torch.manual_seed(0)
    return LanguageModel(V, lambda size: Recurrent(size, H, cell), embedding_size, **settings).double()


@pytest.fixture
def tokens():
    return torch.randint(V, (T, B), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("embedding_size", [5, None])
@pytest.mark.parametrize("cell", [LSTMCell, RNNCell])
def test_a_split_text_with_carried_state_gives_the_logits_of_the_whole(embedding_size, cell, tokens):
    net = network(embedding_size, cell)
    whole, final = net(tokens)
    assert whole.shape == (T, B, V)
    first, state = net(tokens[:3])
    second, state = net(tokens[3:], state)
    assert_close(torch.cat([first, second]), whole)
    assert_close(state, final)


def test_one_hot_input_makes_the_integrators_input_matrix_the_embedding(tokens):
    net = network(embedding_size=None)
    with_embedding = network(embedding_size=V)
    with_embedding.load_state_dict(net.state_dict() | {"embedding.weight": torch.eye(V, dtype=torch.float64)})
    assert_close(net(tokens)[0], with_embedding(tokens)[0])


def test_tied_weights_are_one_parameter(tokens):
    net = network(embedding_size=H, tied=True)
    assert net.decoder.weight is net.embedding.weight
    assert net(tokens)[0].shape == (T, B, V)


def test_tied_weights_of_different_sizes_are_refused():
    with pytest.raises(MultintError, match="embedding_size to 6"):
        network(5, tied=True)


@pytest.mark.parametrize("option", ["bidirectional", "batch_first"])
def test_a_stack_that_reads_its_targets_is_refused(option):
    with pytest.raises(MultintError, match=option):
        LanguageModel(V, lambda size: Recurrent(size, H, LSTMCell, **{option: True}))


@pytest.mark.parametrize("settings", [{"dropout": 1.0}, {"dropout": -0.1}, {"embedding_size": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MultintError, match=next(iter(settings))):
        network(**settings)


def test_dropout_acts_in_training_only(tokens):
    net = network(dropout=0.5)
    assert not torch.equal(net(tokens)[0], net(tokens)[0])
    net.eval()
    assert_close(net(tokens)[0], net(tokens)[0], rtol=0, atol=0)


def test_uniform_fills_matrices_by_stream_and_leaves_vectors():
    def cell(x, h):
        return LSTMCell(x, h, lambda *sizes: MultiplicativeIntegration(*sizes, alpha=2.0))

    net = network(cell=cell, initialise=Uniform(0.02, input_scale=0.6))
    gates = net.recurrent.directions[0].cell.gates
    assert 0.5 < gates.x_projection.weight.abs().max() <= 0.6
    for matrix in (gates.z_projection.weight, net.embedding.weight, net.decoder.weight):
        assert 0.015 < matrix.abs().max() <= 0.02
    assert_close(gates.alpha, torch.full_like(gates.alpha, 2.0))


def test_uniform_fills_integrators_alone_when_told():
    net = network(initialise=Uniform(0.02, integrators_only=True))
    gates = net.recurrent.directions[0].cell.gates
    for matrix in (gates.x_projection.weight, gates.z_projection.weight):
        assert 0.015 < matrix.abs().max() <= 0.02
    for matrix in (net.embedding.weight, net.decoder.weight):
        assert matrix.abs().max() > 0.1


def test_uniform_asks_the_outermost_integrator_which_matrices_are_the_inputs():
    def swapped(x_features, z_features, out_features):
        return Swapped(LowRank(z_features, x_features, out_features, rank=2, z_term=False, x_term=False))

    net = network(cell=lambda x, h: RNNCell(x, h, swapped), initialise=Uniform(0.02, input_scale=0.6))
    integrator = net.recurrent.directions[0].cell.integrator
    inputs = [integrator.get_parameter(name) for name in integrator.x_weights]
    states = [integrator.get_parameter(name) for name in integrator.z_weights if name not in integrator.x_weights]
    assert inputs
    assert states
    assert all(matrix.abs().max() > 0.1 for matrix in inputs)
    assert all(matrix.abs().max() <= 0.02 for matrix in states)


def test_uniform_takes_a_matrix_that_the_streams_share_for_no_input_matrix():
    net = network(cell=lambda x, h: RNNCell(x, h, Concat), initialise=Uniform(0.02, input_scale=0.6))
    assert net.recurrent.directions[0].cell.integrator.projection.weight.abs().max() <= 0.02


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"scale": 0.1, "input_scale": -1.0}])
def test_uniform_refuses_a_width_that_is_not_positive(settings):
    with pytest.raises(MultintError, match="positive"):
        Uniform(**settings)


def draw(net, seed=0, **settings):
    return sample(net, torch.tensor([1, 2]), 20, generator=torch.Generator().manual_seed(seed), **settings)


def test_sampling_repeats_with_its_seed_and_leaves_the_mode():
    net = network(dropout=0.5)
    assert draw(net).shape == (20,)
    assert_close(draw(net), draw(net))
    assert not torch.equal(draw(net), draw(net, seed=1))
    assert net.training


def test_the_likeliest_symbol_is_drawn_at_temperature_0_and_from_the_top_1():
    net = network()
    assert_close(draw(net, temperature=0.0), draw(net, seed=1, top_k=1))
    text = torch.cat([torch.tensor([1, 2]), draw(net, temperature=0.0)])
    logits, _ = net(text[:, None])
    assert_close(logits[1:-1, 0].argmax(-1), text[2:])


@pytest.mark.parametrize("temperature", [1e-40, 1e-320])
def test_the_lowest_temperatures_draw_the_likeliest_symbol(temperature):
    net = network().float()
    assert_close(draw(net, temperature=temperature), draw(net, temperature=0.0))


def test_sampling_follows_the_distribution_of_the_top_k():
    net = network()
    logits, _ = net(torch.tensor([[1], [2]]))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([sample(net, torch.tensor([1, 2]), 1, 0.5, 3, generator) for _ in range(500)])
    top = logits[-1, 0].topk(3)
    expected = torch.zeros(V, dtype=torch.float64).index_put((top.indices,), (top.values / 0.5).softmax(-1))
    assert_close(drawn.bincount(minlength=V) / 500, expected, atol=0.08, rtol=0, check_dtype=False)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": V - 1}, {"top_k": 2}], ids=str)
def test_a_banned_symbol_is_never_drawn_and_the_others_are_as_before(settings):
    net, banned = network(), [0, 3, 7]
    assert not set(draw(net, banned=banned, **settings).tolist()) & set(banned)
    assert set(draw(net, banned=range(1, V), **settings).tolist()) == {0}
    # The same is drawn of a network that gives them no chance.
    with torch.no_grad():
        net.decoder.bias[banned] = -1e4
    assert_close(draw(net, banned=banned, **settings), draw(net, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": torch.zeros(0, dtype=torch.long)},
        {"length": 0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"banned": [V]},
        {"banned": [-1]},
        {"banned": range(V)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_sampling_refuses_settings_out_of_range(settings):
    name = next(iter(settings))
    with pytest.raises(MultintError, match=name):
        sample(network(), **({"prompt": torch.tensor([1]), "length": 1} | settings))
