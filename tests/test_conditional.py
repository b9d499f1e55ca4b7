"""The stack of integrators on one context, beyond the laws that hold for every integrator."""

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
    Hypernetwork,
    LowRank,
    MultintError,
    MultiplicativeIntegration,
)
from multint.integrators import Normalised, Projected, flops
from tests.catalogue import normal, randomise

X, C, OUT = 7, 5, 3
FORMS = {
    "plain": None,
    "skip": Concat,
    "additive": Additive,
    "mi": MultiplicativeIntegration,
    "low-rank": partial(LowRank, rank=4),
    "bilinear": Bilinear,
    "film": Diagonal,
    "hypernetwork": Hypernetwork,
    "hypernetwork-diagonal": partial(Hypernetwork, features=4, head=Diagonal),
}
x, c = normal(6, X), normal(6, C, seed=2)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def stack(**settings):
    return randomise(Conditional(X, C, OUT, hidden=6, **settings).double())


def test_without_an_integrator_it_is_a_plain_network_on_both():
    f = stack(integrator=None, layers=4, gain=1)
    first, *others = f.layers
    y = nn.functional.linear(torch.cat([x, c], -1), first.projection.weight, first.bias)
    for layer in others:
        y = nn.functional.linear(y.relu(), layer.weight, layer.bias)
    exact(f(x, c), y)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
def test_it_is_its_equation(residual, norm):
    f = stack(integrator=MultiplicativeIntegration, layers=4, residual=residual, norm=norm, gain=0.7)
    y = 0.7 * f.layers[0](x, c).relu()
    for layer, n in zip(f.layers[1:3], f.norms[:2], strict=True):
        y = 0.7 * layer(n(y), c).relu() + (y if residual else 0)
    exact(f(x, c), f.layers[3](f.norms[2](y), c))


def test_film_is_a_linear_layer_scaled_and_shifted():
    f = stack(integrator=Diagonal, layers=2)
    y = x
    for k, layer in enumerate(f.layers):
        y = y if k == 0 else 2**0.5 * y.relu()
        film = layer.integrator
        scale = c @ film.scale_projection.weight.T + film.scale_bias
        y = scale * (y @ layer.projection.weight.T) + c @ film.shift_projection.weight.T + film.shift_bias
    exact(f(x, c), y)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_word_and_starts_with_about_unit_variance(form):
    torch.manual_seed(0)
    stacks = [Conditional(48, 64, 40, hidden=64, layers=5, integrator=FORMS[form]) for _ in range(10)]
    with torch.no_grad():
        moments = [f(torch.randn(256, 48), torch.randn(256, 64)).square().mean() for f in stacks]
    # MI's results are skewed, and a ReLU lets more of them through.
    assert 0.75 <= torch.stack(moments).mean() <= (1.6 if form == "mi" else 1.25)


@pytest.mark.parametrize("form", FORMS)
def test_contexts_are_shared_by_rows_and_steps(form):
    f = stack(integrator=FORMS[form])
    steps, rows, sets = (
        normal(4, 6, X, seed=3),
        normal(6, 4, X, seed=4),
        [f(normal(6, 4, X, seed=4)[i], c[i]) for i in range(6)],
    )
    exact(f(steps, c), torch.stack([f(step, c) for step in steps]))
    exact(f(rows, c.unsqueeze(1)), torch.stack(sets))
    exact(f(x, c[0]), f(x, c[:1].expand(6, C)))
    with pytest.raises(MultintError, match=r"\(6, 4\) and \(6,\) do not broadcast.*unsqueeze the shorter to \(6, 1\)"):
        f(rows, c)


def test_a_shared_context_is_contracted_once():
    """Weights generated from the context, for all rows of a set; not copied for each of them either."""
    f = Bilinear(64, 32, 128, x_term=False, z_term=False, bias=None)
    with torch.device("meta"):
        sets, contexts = torch.randn(16, 500, 64), torch.randn(16, 1, 32)
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            self.numel = max(self.numel, result.untyped_storage().nbytes() // 4)
            return result

    with FlopCounterMode(display=False) as counter, Largest() as largest:
        f.to("meta")(sets, contexts)
    assert counter.get_total_flops() == 2 * 16 * 128 * 64 * (32 + 500)
    assert largest.numel <= 16 * 500 * 128


def test_an_integrator_that_needs_equal_features_comes_after_a_linear_map():
    for integrator in (Diagonal, FORMS["hypernetwork-diagonal"], partial(Normalised, integrator=Diagonal)):
        f = Conditional(6, C, 6, hidden=6, layers=2, integrator=integrator)  # whatever the sizes
        assert all(isinstance(layer, Projected) for layer in f.layers)
    assert not any(isinstance(layer, Projected) for layer in stack(integrator=LowRank).layers)


def test_a_row_of_one_layer_is_the_integrator_itself():
    f = stack(integrator=LowRank, layers=1)
    exact(f(x, c), f.layers[0](x, c))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers is 0, expected a whole number of at least 1"),
        ({"hidden": 0}, "hidden is 0"),
        ({"integrator": nn.Bilinear}, "integrator gives a Bilinear, expected a multint.Integrator"),
        ({"activation": nn.ReLU}, "activation gives a ReLU for a tensor .* expected an elementwise function"),
        ({"activation": torch.sum}, r"activation gives the shape \(\)"),
        ({"activation": nn.PReLU(device="meta")}, "meta device; give its gain"),
        ({"activation": "relu"}, "activation is 'relu', expected an elementwise function"),
        ({"activation": "relu", "gain": 1}, "activation is 'relu'"),
        ({"activation": partial(torch.softmax, dim=-1)}, "makes a number's result depend on the others"),
        ({"activation": nn.Softmax(-1), "gain": 1}, "makes a number's result depend on the others"),
        ({"norm": nn.ReLU()}, r"norm is a ReLU, expected a factory \(features\) -> module"),
        ({"norm": 3}, "norm is a int, expected a factory"),
        ({"gain": "a"}, "gain is 'a', expected a number"),
        ({"hidden": 1, "norm": nn.LayerNorm}, "norm is the layer normalisation of one feature"),
        ({"integrator": partial(LowRank, rank=0)}, "LowRank: rank is 0"),
    ],
)
def test_wrong_settings_say_what_was_expected(settings, message):
    with pytest.raises(MultintError, match=message):
        Conditional(X, C, OUT, **settings)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ((x, normal(6, 4)), r"context has 4 features, expected 5 \(context_features\)"),
        ((x, None), r"context is a NoneType, expected a tensor \(\.\.\., 5\)"),
        ((x, [0.0] * C), "context is a list"),
        ((x.numpy(), c), r"x is a ndarray, expected a tensor \(\.\.\., 7\)"),
    ],
)
def test_a_stream_that_does_not_fit_is_named(streams, message):
    with pytest.raises(MultintError, match=f"Conditional: {message}"):
        stack()(*streams)


def test_a_context_without_features_is_refused():
    with pytest.raises(MultintError, match="context_features is 0"):
        Conditional(X, 0, OUT)


def test_residual_warns_where_it_has_no_effect():
    with pytest.warns(UserWarning, match="residual has no effect with layers=2"):
        stack(layers=2, residual=True)


def test_any_activation_keeps_the_second_moment():
    for activation in (torch.relu, torch.tanh, nn.GELU(), nn.PReLU(), nn.Identity(), nn.SiLU()):
        f = Conditional(X, C, OUT, activation=activation)
        u = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close((f.gain * activation(u)).square().mean(), torch.tensor(1.0), rtol=0.02, atol=0)
    assert Conditional(X, C, OUT).gain == pytest.approx(2**0.5, rel=1e-6)
    assert Conditional(X, C, OUT, activation=nn.RReLU()).gain == pytest.approx(2**0.5, rel=0.1)  # draws, by the element
    assert Conditional(X, C, OUT, activation=torch.zeros_like).gain == 1


def test_a_stack_is_built_without_memory_and_counted():
    with torch.device("meta"):
        f = Conditional(1024, 64, 1024, integrator=Hypernetwork)
    assert f.layers[0].head.interaction.weight.is_meta
    assert flops(Conditional(4, 3, 5, hidden=6, layers=2, integrator=None)) == 2 * (7 * 6 + 6 * 5)
