"""Language models with multiplicative encoders and output embeddings, against a loop of NumPy and the paper's sizes."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models import LanguageModel
from multint import (
    Additive,
    Bilinear,
    Hypernetwork,
    LowRank,
    LSTMCell,
    MultintError,
    MultiplicativeIntegration,
    Recurrent,
    RNNCell,
)

V, X, H, C, T, B = 9, 5, 4, 3, 6, 2
OUT = X  # as tied weights need it
MODELS = {
    "LSTM": {},
    "MultDec": {"output": Bilinear},
    "MultEncDec": {"encoder": Bilinear, "output": Bilinear},
    "MultDec of the state": {"output": Bilinear, "context": "state"},
}


def network(**settings):
    torch.manual_seed(0)
    cell = partial(LSTMCell, integrator=Additive)
    sizes = {"embedding_size": X, "output_size": OUT, "context_size": C}
    return LanguageModel(V, lambda size: Recurrent(size, H, cell), **sizes, **settings).double()


@pytest.fixture
def tokens():
    return torch.randint(V, (T + 1, B), generator=torch.Generator().manual_seed(1))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bilinear(p, name, x, z):
    """zᵀWx + Uz + Vx + b, row by row."""
    W, U, V = (p[f"{name}.{part}.weight"] for part in ("interaction", "lower.z_projection", "lower.x_projection"))
    y = np.array([[zi @ W[o] @ xi for o in range(len(W))] for xi, zi in zip(x, z, strict=True)])
    return y + z @ U.T + x @ V.T + p[f"{name}.lower.bias"]


def loop(net, parameters, tokens):
    """The logits (T, B, V), written from the equations."""
    p = parameters
    gates = "recurrent.directions.0.cell.gates"
    h, c, logits = np.zeros((B, H)), np.zeros((B, H)), []
    for t in range(T):
        e = x = p["embedding.weight"][tokens[t]]
        if net.input_context is not None:
            context = np.maximum(e @ p["input_context.weight"].T + p["input_context.bias"], 0)
        if net.encoder is not None:
            x = bilinear(p, "encoder", e, context)
        z = x @ p[f"{gates}.x_projection.weight"].T + h @ p[f"{gates}.z_projection.weight"].T + p[f"{gates}.bias"]
        i, f, g, o = np.split(z, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        if net.state_context is not None:
            context = np.maximum(h @ p["state_context.weight"].T + p["state_context.bias"], 0)
        if net.output is not None:
            out = bilinear(p, "output", h, context)
        else:
            out = h @ p["projection.weight"].T + p["projection.bias"]
        logits.append(out @ p["decoder.weight"].T + p["decoder.bias"])
    return np.stack(logits)


def loss_of(logits, targets):
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, targets[..., None], -1).mean()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_it_equals_a_loop_of_numpy_in_outputs_and_gradients(name, tied, tokens):
    net = network(tied=tied, **MODELS[name])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    logits, _ = net(tokens[:-1])
    parameters = {key: value.detach().numpy() for key, value in net.named_parameters(remove_duplicate=False)}
    ids = tokens.numpy()
    assert_close(logits.detach(), torch.from_numpy(loop(net, parameters, ids)), rtol=1e-10, atol=1e-10)

    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten()).backward()
    chance = np.random.default_rng(0)
    for key, parameter in net.named_parameters():
        # One direction in the space of each parameter; those of a tied weight share their memory.
        direction = chance.normal(size=parameter.shape)
        along = []
        for step in (1e-5, -1e-5):
            moved = parameters[key].copy()
            parameters[key] += step * direction
            along.append(loss_of(loop(net, parameters, ids), ids[1:]))
            parameters[key][...] = moved
        slope = (along[0] - along[1]) / 2e-5
        assert (parameter.grad.numpy() * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-9), key


def paper(**settings):
    """The sizes of Jayakumar et al. 2020 on WikiText-103."""
    cell = partial(LSTMCell, integrator=Additive)
    sizes = {"embedding_size": 256, "output_size": 256, "context_size": 32, "tied": True}
    with torch.device("meta"):
        net = LanguageModel(267_735, lambda size: Recurrent(size, 2048, cell), **sizes, **settings)
    return sum(parameter.numel() for parameter in net.parameters())


def test_the_papers_sizes_have_the_papers_counts():
    assert paper() == 88_214_999
    assert paper(output=Bilinear) == 105_008_631  # 105.01 M; the table says 105M
    assert paper(encoder=Bilinear, output=Bilinear) == 107_179_767  # the table's 110M is not determined


@pytest.mark.parametrize(
    "form",
    [Bilinear, MultiplicativeIntegration, partial(LowRank, rank=2), partial(Hypernetwork, features=7)],
    ids=["bilinear", "mi", "low-rank", "hypernetwork"],
)
@pytest.mark.parametrize("context", ["input", "state"])
def test_any_integrator_takes_either_place(form, context, tokens):
    net = network(encoder=form, output=form, context=context)
    whole, final = net(tokens)
    first, state = net(tokens[:2])
    second, state = net(tokens[2:], state)
    assert_close(torch.cat([first, second]), whole)
    assert_close(state, final)
    whole.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_tied_output_embedding_has_the_embeddings_size_by_itself(tokens):
    torch.manual_seed(0)
    net = LanguageModel(V, lambda size: Recurrent(size, H, RNNCell), X, output=Bilinear, tied=True)
    assert net.output.out_features == X
    assert net(tokens)[0].shape == (T + 1, B, V)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"context_size": 0}, "context_size is 0"),
        ({"output_size": 0}, "output_size is 0"),
        ({"word_dropout": 1.0}, "word_dropout is 1.0"),
        ({"tied": True, "output_size": OUT + 1}, "output_size to 5"),
        ({"output": lambda h, c, o: Bilinear(h, c, o + 1)}, r"output gives a Bilinear of the sizes .* = \(4, 32, 5\)"),
        ({"encoder": lambda x, c, o: torch.nn.Bilinear(x, c, o)}, "encoder gives a Bilinear, expected a multint.Integ"),
        ({"encoder": Bilinear(X, C, X)}, "encoder is a Bilinear, expected a factory"),
        ({"tied": True, "embedding_size": None}, "give an embedding_size"),
        ({"context": "output"}, "context is 'output', expected 'input' or 'state'"),
        ({"recurrent": lambda size: Recurrent(7, H, RNNCell)}, "recurrent reads 7 features, expected 5"),
    ],
)
def test_bad_settings_are_refused(settings, part):
    with pytest.raises(MultintError, match=part):
        LanguageModel(V, **{"recurrent": lambda size: Recurrent(size, H, RNNCell), "embedding_size": X} | settings)


def test_a_dropped_word_is_dropped_wherever_it_stands():
    torch.manual_seed(0)
    net = network(word_dropout=0.5)
    seen = net._embedded(torch.arange(V).repeat(2, 1).T)
    assert_close(seen[:, 0], seen[:, 1])
    dropped = (seen[:, 0] == 0).all(-1)
    assert 0 < dropped.sum() < V
    assert_close(seen[~dropped][:, 0], 2 * net.embedding.weight[~dropped])
    assert_close(net.eval()._embedded(torch.arange(V)[:, None])[:, 0], net.embedding.weight)


def test_locked_dropout_has_one_mask_for_all_steps():
    torch.manual_seed(0)
    net = network(dropout=0.5, locked=True)
    kept = net._dropped(torch.ones(T, B, H)) != 0
    assert (kept == kept[:1]).all()
    assert kept.any()
    assert not kept.all()
