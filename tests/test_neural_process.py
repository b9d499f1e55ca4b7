"""Neural processes: the laws of sets, likelihoods against their definitions, and clear errors."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from models import (
    AttentiveEncoder,
    ConcatMLP,
    Glorot,
    LatentEncoder,
    NeuralProcess,
    Points,
    PooledEncoder,
    elbo,
    importance_weighted,
    log_likelihood,
    padded,
)
from models.neural_process import joined
from multint import Bilinear, Concat, Conditional, Diagonal, Hypernetwork, LowRank, MultiplicativeIntegration
from multint.errors import OptionError, ShapeError

X, Y = 2, 3
POOLED = partial(PooledEncoder, hidden=12, layers=3, post_layers=2, copies=2)
ATTENTIVE = partial(AttentiveEncoder, hidden=12, layers=3, heads=2)
LATENT = partial(LatentEncoder, features=5, hidden=12, layers=3, post_layers=1)
PATHS = {
    "cnp": {"encoder": POOLED},
    "acnp": {"encoder": ATTENTIVE},
    "latent": {"encoder": None, "latent": LATENT},
    "np": {"encoder": POOLED, "latent": LATENT},
    "anp": {"encoder": ATTENTIVE, "latent": partial(LATENT, attention_heads=2)},
}
WITH_Z = {name: paths for name, paths in PATHS.items() if "latent" in paths}

of_every_path = pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
of_latent_paths = pytest.mark.parametrize("paths", WITH_Z.values(), ids=WITH_Z)


def network(paths, **settings):
    torch.manual_seed(0)
    return NeuralProcess(X, Y, **paths, **settings).double()


def points(batch, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Points(*(torch.randn(batch, count, size, generator=generator, dtype=torch.float64) for size in (X, Y)))


def scores(net, context, targets):
    """Every score of the tasks with the same draws at every call, and the gradients of their sum."""
    everything = joined(context, targets)
    of_tasks = [*log_likelihood(net, context, targets, 4, torch.Generator().manual_seed(1))]
    if net.latent is not None:
        of_tasks.append(importance_weighted(net, context, targets, everything, 4, torch.Generator().manual_seed(2)))
        of_tasks.append(elbo(net, context, everything, everything, 4, torch.Generator().manual_seed(3)))
    of_tasks = torch.stack(of_tasks)
    return of_tasks, torch.autograd.grad(of_tasks.sum(), list(net.parameters()), materialize_grads=True)


@of_every_path
def test_the_order_of_points_does_not_matter(paths):
    net, context, targets = network(paths), points(2, 5), points(2, 4, seed=1)
    orders = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 3, 0, 1])
    shuffled = [Points(p.x[:, order], p.y[:, order]) for p, order in zip((context, targets), orders, strict=True)]
    assert_close(scores(net, *shuffled), scores(net, context, targets))


@of_every_path
@pytest.mark.parametrize("count", [0, 3])
def test_padding_does_not_matter_whatever_it_holds(paths, count):
    net, tasks = network(paths), (points(2, count), points(2, 4, seed=1))
    wrapped = []
    for sets in tasks:
        before, after = (torch.full((2, 2, size), bad) for size, bad in ((X, math.nan), (Y, math.inf)))
        x, y = torch.cat([before, sets.x], 1), torch.cat([after, sets.y], 1)
        mask = torch.tensor([False, False] + [True] * sets.x.shape[1]).expand(2, -1)
        wrapped.append(Points(x.double(), y.double(), mask))
    assert_close(scores(net, *wrapped), scores(net, *tasks))


@of_every_path
def test_tasks_of_ragged_sizes_do_not_see_each_other(paths):
    net, x, z = network(paths), points(3, 6).x, None
    alone = [points(1, count, seed=count) for count in (4, 0, 7)]
    together = padded([(one.x[0], one.y[0]) for one in alone])
    if net.latent is not None:
        z = torch.randn(2, 3, 5, dtype=torch.float64)
        assert_close(net.prior(together), tuple(map(torch.cat, zip(*map(net.prior, alone), strict=True))))
    each = [net(one, x[i : i + 1], None if z is None else z[:, i : i + 1]) for i, one in enumerate(alone)]
    assert_close(net(together, x, z).mean, torch.cat([prediction.mean for prediction in each], -3))


@of_every_path
def test_an_empty_context_gives_the_prior(paths):
    """It is the same for every task, and finite, and something to learn."""
    net, x = network(paths), points(1, 6).x.expand(3, -1, -1)
    z = None if net.latent is None else torch.randn(2, 1, 5, dtype=torch.float64).expand(-1, 3, -1)
    prediction = net(points(3, 0), x, z)
    for values in prediction:
        assert torch.isfinite(values).all()
        assert_close(values, values[..., :1, :, :].expand_as(values))
    _, gradients = scores(net, points(3, 0), points(3, 4))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@of_every_path
def test_likelihoods_are_what_they_say(paths):
    """Against torch's distributions, one draw and one task at a time."""
    net, context, targets, draws = network(paths, shift=1.0), points(2, 5), points(2, 4, seed=1), 3
    z = None
    if net.latent is not None:
        z = net.prior(context).sample(draws, torch.Generator().manual_seed(1))
    marginal, joint = log_likelihood(net, context, targets, draws, torch.Generator().manual_seed(1))
    for task in range(2):
        of_draws = []
        for k in range(1 if z is None else draws):
            one = Points(*(values[task : task + 1] for values in context[:2]))
            mean, std = net(one, targets.x[task : task + 1], None if z is None else z[k : k + 1, task : task + 1])
            of_draws.append(Normal(mean, std).log_prob(targets.y[task]).sum(-1).reshape(-1))
        densities = torch.stack(of_draws).exp()  # (K, N)
        assert_close(marginal[task], densities.mean(0).log().mean())
        assert_close(joint[task], densities.prod(-1).mean().log() / 4)


@of_latent_paths
def test_the_elbo_is_the_notebooks(paths):
    net, context, everything = network(paths), points(2, 5), points(2, 9, seed=1)
    bound = elbo(net, context, everything, everything, 2, torch.Generator().manual_seed(1))
    posterior, prior = Normal(*net.prior(everything)), Normal(*net.prior(context))
    z = net.prior(everything).sample(2, torch.Generator().manual_seed(1))
    densities = Normal(*net(context, everything.x, z)).log_prob(everything.y).sum(-1)
    divergence = kl_divergence(posterior, prior).sum(-1)
    assert_close(bound, densities.mean((0, 2)) - divergence / 9)


@of_latent_paths
def test_importance_weights_estimate_the_joint_likelihood(paths):
    """Two estimates of one number, by draws from the prior and from the posterior."""
    net, context, targets = network(paths, floor=0.9), points(1, 4), points(1, 2, seed=1)
    everything, draws = joined(context, targets), 20_000
    with torch.no_grad():
        joint = log_likelihood(net, context, targets, draws, torch.Generator().manual_seed(1)).joint
        weighted = importance_weighted(net, context, targets, everything, draws, torch.Generator().manual_seed(2))
    assert_close(weighted, joint, rtol=0, atol=0.02)


def test_the_deviation_has_a_floor():
    net = network(PATHS["cnp"], floor=0.3, shift=50.0)
    std = net(points(2, 3), points(2, 4).x).std
    assert_close(std, torch.full_like(std, 0.3))


def test_a_concat_mlp_is_an_mlp_of_both():
    decoder = ConcatMLP(X, 4, 6, hidden=7, layers=3).double()
    x, c = torch.randn(3, 5, X, dtype=torch.float64), torch.randn(3, 1, 4, dtype=torch.float64)
    whole = decoder.rest(decoder.first(torch.cat([x, c.expand(-1, 5, -1)], -1)).relu())
    assert_close(decoder(x, c), whole)


# The parameters of the published decoder of 128 features, [x; r; z] → 2: of 1 + 256.
BUDGET = 257 * 128 + 128 + 128 * 128 + 128 + 128 * 2 + 2


@pytest.mark.parametrize(
    ("integrator", "hidden", "hidden_without"),
    [
        (None, 186, 128),
        (Concat, 172, 82),
        (MultiplicativeIntegration, 170, 82),
        (LowRank, 114, 44),
        (partial(LowRank, rank=16), 144, 58),
        (Bilinear, 33, None),
        (Diagonal, 147, 45),
        (partial(Hypernetwork, features=8), 65, 67),
    ],
)
def test_every_integrator_decodes_at_the_published_size(integrator, hidden, hidden_without):
    """The widths in configs/functions/_protocol_b.yaml."""
    for context_size, width in ((32, hidden), (None, hidden_without)):
        if width is None:
            continue
        decoder = partial(Conditional, hidden=width, integrator=integrator)
        net = NeuralProcess(1, 1, latent=LatentEncoder, decoder=decoder, context_size=context_size)
        after = [*net.projection.parameters(), *net.decoder.parameters()]
        assert sum(p.numel() for p in after) == pytest.approx(BUDGET, rel=0.01)
        context, z = Points(torch.randn(2, 3, 1), torch.randn(2, 3, 1)), torch.randn(4, 2, 128)
        assert net(context, torch.randn(2, 5, 1), z).mean.shape == (4, 2, 5, 1)


NARROW, WIDE = torch.zeros(2, 3, X), torch.zeros(2, 3, X + 1)
VALUES, ONE_Z = torch.zeros(2, 3, Y), torch.zeros(1, 2, 5)


@pytest.mark.parametrize(
    ("context", "targets", "parts"),
    [
        (Points(WIDE, VALUES), Points(NARROW, VALUES), ["x of the context has 3 features, expected 2 (x_features)"]),
        (Points(NARROW, NARROW), Points(NARROW, VALUES), ["y of the context has 2 features, expected 3 (y_features)"]),
        (Points(NARROW, VALUES), Points(WIDE, VALUES), ["x of the targets has 3 features, expected 2"]),
        (Points(NARROW, VALUES[:, :2]), Points(NARROW, VALUES), ["(2, 3)", "(2, 2)", "with a mask"]),
        (Points([NARROW[0], NARROW[0, :1]], VALUES), Points(NARROW, VALUES), ["list", "`padded`"]),
        (Points(NARROW[0], VALUES[0]), Points(NARROW, VALUES), ["x of the context is (3, 2), expected (B, N, 2)"]),
        (Points(NARROW, VALUES, torch.ones(2, 3)), Points(NARROW, VALUES), ["mask", "torch.float32", "torch.bool"]),
        (Points(NARROW, VALUES), Points(NARROW[:, :0], VALUES[:, :0]), ["has no targets"]),
        (
            Points(NARROW, VALUES),
            Points(NARROW, VALUES, torch.tensor([[True] * 3, [False] * 3])),
            ["a task has no targets"],
        ),
        (Points(NARROW[:1], VALUES[:1]), Points(NARROW, VALUES), ["1 contexts and 2 sets of targets"]),
        (Points(NARROW, VALUES), None, ["the targets are a NoneType, expected Points"]),
        ((NARROW, VALUES), Points(NARROW, VALUES), ["the context are a tuple, expected Points(x, y)"]),
        (Points(NARROW, VALUES, [[True] * 3] * 2), Points(NARROW, VALUES), ["the mask of the context is a list"]),
    ],
)
def test_points_that_do_not_fit_are_refused(context, targets, parts):
    net = NeuralProcess(X, Y, encoder=POOLED)
    with pytest.raises(ShapeError) as error:
        log_likelihood(net, context, targets)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, context: net(context, None, ONE_Z), "x of the targets is a NoneType, expected a tensor"),
        (lambda net, context: net(context, [NARROW[0], NARROW[0, :1]], ONE_Z), "x of the targets is a list"),
        (lambda net, context: net(context, NARROW, ONE_Z[..., :4]), r"z is \(1, 2, 4\), expected a tensor \(K, 2, 5\)"),
        (lambda net, context: net(context, NARROW, ONE_Z[:, :1]), r"z is \(1, 1, 5\), expected a tensor \(K, 2, 5\)"),
        (lambda net, context: net(context, NARROW, ONE_Z[0]), r"z is \(2, 5\), expected a tensor \(K, 2, 5\)"),
        (lambda net, context: net(context, NARROW, [0.0] * 5), r"z is a list, expected a tensor \(K, 2, 5\)"),
        (lambda net, context: importance_weighted(net, context, context, None), "a NoneType, expected Points"),
        (lambda net, context: padded([]), "padded: got no sets"),
        (lambda net, context: padded([(NARROW[0], VALUES[0]), (NARROW[0], VALUES[0, :2])]), "set 1 has 3 points x and"),
        (lambda net, context: joined(context, Points(NARROW[:1], VALUES[:1])), "joined: 2 and 1 sets"),
        (lambda net, context: joined(context, Points(WIDE, VALUES)), "joined: .* has 3 features, expected 2"),
        (lambda net, context: ConcatMLP(X, 4, 6)(NARROW, NARROW), "ConcatMLP: context has 2 features, expected 4"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(call, message):
    net = NeuralProcess(X, Y, **PATHS["np"])
    with pytest.raises(ShapeError, match=message):
        call(net, Points(NARROW, VALUES))


def test_a_mask_is_where_the_sets_are():
    sets = padded([(torch.zeros(n, X, device="meta"), torch.zeros(n, Y, device="meta")) for n in (3, 2)])
    assert {values.device.type for values in sets} == {"meta"}
    assert sets.mask.shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": None}, "no encoder and no latent path"),
        ({"floor": 1.0}, "floor is 1.0"),
        ({"context_size": 0}, "context_size is 0"),
        ({"x_features": -1}, "NeuralProcess: x_features is -1, expected a whole number of at least 1"),
        ({"y_features": 0}, "NeuralProcess: y_features is 0"),
        ({"encoder": partial(PooledEncoder, copies=0)}, "copies is 0"),
        ({"encoder": partial(PooledEncoder, layers=0)}, "layers is 0"),
        ({"encoder": partial(PooledEncoder, hidden=-3)}, "hidden is -3, expected a whole number of at least 1"),
        ({"encoder": partial(AttentiveEncoder, heads=3)}, "128 features among 3 heads"),
        ({"encoder": partial(AttentiveEncoder, layers=2)}, "layers is 2"),
        ({"encoder": partial(AttentiveEncoder, hidden=0)}, "hidden is 0"),
        ({"latent": partial(LatentEncoder, floor=-0.1)}, "floor is -0.1"),
        ({"latent": partial(LatentEncoder, features=0)}, "LatentEncoder: features is 0"),
        ({"latent": partial(LatentEncoder, features=0, post_layers=0)}, "LatentEncoder: features is 0"),
        ({"latent": partial(LatentEncoder, hidden=0)}, "hidden is 0"),
        ({"decoder": partial(ConcatMLP, layers=1)}, "layers is 1"),
        ({"decoder": partial(ConcatMLP, hidden=0)}, "ConcatMLP: hidden is 0"),
        ({"encoder": nn.Linear}, "encoder gives a Linear, expected Encoder"),
        ({"encoder": LatentEncoder}, "encoder gives a LatentEncoder, expected Encoder"),
        ({"encoder": PooledEncoder(X, Y)}, r"encoder is a PooledEncoder, expected a factory \(X, Y\) -> Encoder"),
        ({"latent": PooledEncoder}, "latent gives a PooledEncoder, expected LatentEncoder"),
        ({"latent": "LatentEncoder"}, "latent is a str, expected a factory"),
        ({"decoder": nn.Linear}, "decoder gives a Linear, expected a multint.Integrator"),
        ({"decoder": PooledEncoder}, "decoder gives a PooledEncoder, expected a multint.Integrator"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(OptionError, match=message):
        NeuralProcess(**{"x_features": X, "y_features": Y} | settings)


def test_draws_are_asked_for_where_there_is_a_latent_path_only():
    with_z, without = network(PATHS["np"]), network(PATHS["cnp"])
    context, z = points(2, 3), torch.zeros(1, 2, 5, dtype=torch.float64)
    with pytest.raises(ShapeError, match="got no z"):
        with_z(context, context.x)
    with pytest.raises(ShapeError, match="no latent path"):
        without(context, context.x, z)
    with pytest.raises(OptionError, match="no latent path"):
        without.prior(context)
    with pytest.raises(OptionError, match="samples is 0"):
        log_likelihood(with_z, context, context, 0)


class OneForASet(PooledEncoder):
    """An encoder that has left the dimension of the targets out, so that its rows would meet them as B = N."""

    def forward(self, context, x):
        return super().forward(context, x).squeeze(1)


def test_an_encoder_of_another_shape_is_refused():
    net = network({"encoder": partial(OneForASet, hidden=12)})
    with pytest.raises(ShapeError, match=r"encoder gives \(3, 12\), expected \(3, 3, F\), or \(3, 1, F\)"):
        net(points(3, 4), points(3, 3).x)


@pytest.mark.parametrize("integrator", [LowRank, Hypernetwork, None])
def test_glorot_starts_linear_layers_and_leaves_integrators(integrator):
    def made(**settings):
        torch.manual_seed(0)
        return NeuralProcess(X, Y, PooledEncoder, decoder=partial(Conditional, integrator=integrator), **settings)

    before, after = made(), made(initialise=Glorot())
    assert_close(after.decoder.state_dict(), before.decoder.state_dict(), rtol=0, atol=0)
    layers = [module for module in after.encoder.modules() if isinstance(module, torch.nn.Linear)]
    for layer in layers:
        assert_close(layer.weight.var() * sum(layer.weight.shape) / 2, torch.ones(()), rtol=0.1, atol=0)
        assert not layer.bias.any()
    assert layers


def test_glorot_starts_an_mlp_decoder():
    net = NeuralProcess(X, Y, PooledEncoder, decoder=ConcatMLP, initialise=Glorot())
    assert not any(module.bias.any() for module in net.modules() if isinstance(module, torch.nn.Linear))
