"""Laws of the algebra, each over the whole catalogue of integrators."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import multint
from multint import (
    Additive,
    BiAffine,
    Bilinear,
    Conditional,
    Diagonal,
    Gated,
    Hadamard,
    Hypernetwork,
    Integrator,
    LowRank,
    MultintError,
    MultiplicativeIntegration,
    Pairwise,
    Sum,
    Swapped,
    Through,
    Tucker,
)
from multint.integrators import (
    Normalised,
    Projected,
    ScaledOf,
    SigmoidScale,
    SumOf,
    SwappedOf,
    ThroughOf,
    flops,
    outermost_integrators,
    parameter_count,
    rank,
)
from tests.catalogue import INTEGRATORS, Sizes, normal, randomise

ODD = Sizes(7, 5, 3)
every_integrator = pytest.mark.parametrize("name", INTEGRATORS)


def build(name: str, sizes: Sizes = ODD) -> Integrator:
    return randomise(INTEGRATORS[name](sizes).double())


def has_terms(f: Integrator) -> bool:
    try:
        f.terms()
    except (AttributeError, MultintError):
        return False
    return True


BI_AFFINE = [name for name in INTEGRATORS if has_terms(build(name))]


def test_all_but_these_forms_are_bi_affine():
    without = set(INTEGRATORS) - set(BI_AFFINE)
    forms = ("gated", "sigmoid-scale", "hypernetwork", "normalised", "sum-", "film", "conditional")
    assert without == {name for name in INTEGRATORS if name.startswith(forms)}


@pytest.mark.parametrize("name", BI_AFFINE)
@pytest.mark.parametrize("sizes", [ODD, Sizes(4, 9, 11), Sizes(1, 1, 1)])
def test_forward_equals_the_dense_form(name, sizes):
    f = build(name, sizes)
    x, z = normal(2, 6, sizes.x), normal(2, 6, sizes.z, seed=2)
    torch.testing.assert_close(f(x, z), f.terms()(x, z), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BI_AFFINE)
def test_the_dense_form_has_the_same_gradients(name):
    f, g = build(name), build(name)
    x, z = normal(6, 7), normal(6, 5, seed=2)
    (f(x, z) ** 2).sum().backward()
    (g.terms()(x, z) ** 2).sum().backward()
    for (which, ours), theirs in zip(f.named_parameters(), g.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=which)


@every_integrator
@pytest.mark.parametrize(
    ("x_leading", "z_leading"),
    [
        ((), ()),
        ((4,), (4,)),
        ((3, 4), (3, 4)),
        ((3, 4), (4,)),
        ((4,), (3, 4)),
        ((3, 1), (1, 4)),
        ((2,), ()),
        ((), (2,)),
    ],
)
def test_leading_shapes_broadcast(name, x_leading, z_leading):
    f = build(name)
    x, z = normal(*x_leading, 7), normal(*z_leading, 5, seed=2)
    leading = torch.broadcast_shapes(x_leading, z_leading)
    rows = zip(x.expand(*leading, 7).reshape(-1, 7), z.expand(*leading, 5).reshape(-1, 5), strict=True)
    expected = torch.stack([f(one, other) for one, other in rows]).view(*leading, f.out_features)
    torch.testing.assert_close(f(x, z), expected, rtol=1e-10, atol=1e-10)


@every_integrator
@pytest.mark.parametrize("stream", ["x", "z"])
def test_a_stream_enters_through_its_named_weights_alone(name, stream):
    f = build(name)
    for weight in getattr(f, f"{stream}_weights"):
        f.get_parameter(weight).data.zero_()
    x, z = normal(6, 7), normal(6, 5, seed=2)
    other = (normal(6, 7, seed=3), z) if stream == "x" else (x, normal(6, 5, seed=3))
    if INTEGRATORS[name].square and stream == "x":
        assert f.x_weights == (), "x enters by itself, through no weight"
        return
    torch.testing.assert_close(f(x, z), f(*other), rtol=0, atol=0)


class Product(Integrator):
    """A user's own, without a weight."""

    def integrate(self, x, z):
        return x * z


class Mixture(Integrator):
    """A user's own: parts in a list, and a matrix that no class of ours knows."""

    def __init__(self, x, z, o):
        super().__init__(x, z, o)
        self.experts = nn.ModuleList([Additive(x, z, o), Swapped(LowRank(z, x, o, rank=2, x_term=False))])
        self.inner = nn.Linear(x, o, bias=False)

    @property
    def x_weights(self):
        return ("inner.weight", *super().x_weights)

    def integrate(self, x, z):
        return self.inner(x) + sum(expert(x, z) for expert in self.experts)


def test_the_weights_of_a_users_integrator_are_those_of_its_parts():
    f = Mixture(7, 5, 3)
    lower, swapped = "experts.0", "experts.1.integrator"
    assert f.x_weights == (
        "inner.weight",
        f"{lower}.x_projection.weight",
        f"{swapped}.z_factor.weight",
        f"{swapped}.lower.z_projection.weight",
    )
    assert f.z_weights == (f"{lower}.z_projection.weight", f"{swapped}.x_factor.weight")
    with pytest.raises(MultintError, match="Mixture: x has 8 features"):
        f(torch.ones(2, 8), torch.ones(2, 5))


@every_integrator
def test_gradcheck(name):
    f = build(name)
    inputs = normal(2, 7, requires_grad=True), normal(2, 5, seed=2, requires_grad=True)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@every_integrator
@pytest.mark.parametrize("sizes", [Sizes(256, 32, 64), Sizes(64, 64, 256), ODD])
def test_unit_variance_in_gives_unit_variance_out(name, sizes):
    torch.manual_seed(0)
    # One module has the luck of its draw: the mean over several is what the initialisation promises.
    draws = 300 if name.startswith("conditional") and sizes == ODD else 30  # of several layers, and few features
    if parameter_count(INTEGRATORS[name](sizes)) > 100_000:  # whose luck is small in each module
        draws = 8
    modules = [INTEGRATORS[name](sizes) for _ in range(draws)]
    with torch.no_grad():
        variances = [f(torch.randn(512, sizes.x), torch.randn(512, sizes.z)).var() for f in modules]
    terms = 3 if name.startswith("normalised") else 1  # of unit variance each, since each is normalised
    assert 0.9 <= torch.stack(variances).mean() / terms <= 1.1


@given(alpha=st.floats(0, 3), beta1=st.floats(0, 2), beta2=st.floats(0, 2), bias=st.floats(-1, 1))
@settings(max_examples=20, deadline=None)
def test_mi_starts_where_it_is_told_and_with_unit_variance(alpha, beta1, beta2, bias):
    torch.manual_seed(0)
    f = MultiplicativeIntegration(64, 48, 32, alpha, beta1, beta2, bias)
    for parameter, value in ((f.alpha, alpha), (f.beta1, beta1), (f.beta2, beta2), (f.bias, bias)):
        torch.testing.assert_close(parameter.detach(), torch.full((32,), value))
    if max(alpha, beta1, beta2) > 0.05:
        variance = f(torch.randn(4096, 64), torch.randn(4096, 48)).var()
        assert 0.5 <= variance <= 2.0


@every_integrator
def test_wrong_features_and_leading_shapes_are_named(name):
    f = build(name)
    kind = type(f).__name__
    with pytest.raises(MultintError, match=rf"{kind}: x has 8 features, expected 7 \(x_features\)"):
        f(normal(2, 8), normal(2, 5))
    with pytest.raises(MultintError, match=rf"{kind}: {f.z_name} has 4 features, expected 5 \({f.z_name}_features\)"):
        f(normal(2, 7), normal(2, 4))
    with pytest.raises(MultintError, match=r"leading shapes \(2,\) and \(3,\) do not broadcast"):
        f(normal(2, 7), normal(3, 5))
    with pytest.raises(MultintError, match="x has no dimensions"):
        f(torch.tensor(1.0), normal(2, 5))


@every_integrator
def test_state_dict_and_copies_keep_the_function(name):
    f, g = build(name), INTEGRATORS[name](ODD).double()
    g.load_state_dict(f.state_dict())
    x, z = normal(6, 7), normal(6, 5, seed=2)
    torch.testing.assert_close(g(x, z), f(x, z), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(f)(x, z), f(x, z), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Additive(0, 5, 3), "x_features is 0, expected a whole number of at least 1"),
        (lambda: Additive(7, 5, 3.0), "out_features is 3.0"),
        (lambda: Additive(7, 5, 3, bias=True), "bias is True, expected the number that the vector starts at"),
        (lambda: MultiplicativeIntegration(7, 5, 3, alpha=None), "alpha is None"),
        (lambda: MultiplicativeIntegration(7, 5, 3, beta1=float("nan")), "beta1 is nan"),
        (lambda: LowRank(7, 5, 3, rank=0), "LowRank: rank is 0, expected a whole number of at least 1"),
        (lambda: Bilinear(7, 6, 4, blocks=0), "Bilinear: blocks is 0, expected a whole number of at least 1"),
        (lambda: Bilinear(7, 6, 4, blocks=4), "blocks is 4, expected a divisor of z_features, which is 6"),
        (lambda: Bilinear(7, 6, 4, blocks=3), "blocks is 3, expected a divisor of out_features, which is 4"),
        (lambda: Tucker(7, 5, 3, 8, 2), "x_rank is 8, expected at most the stream's 7 features"),
        (lambda: Diagonal(7, 5, 3), r"out_features is 3, expected x_features \(7\)"),
        (lambda: SigmoidScale(7, 5, 3), r"SigmoidScale: out_features is 3, expected x_features \(7\)"),
        (lambda: SigmoidScale(7, 5, 7, rank=0), "SigmoidScale: rank is 0, expected a whole number"),
        (lambda: Hypernetwork(7, 5, 3, features=0), "features is 0"),
        (lambda: Hypernetwork(7, 5, 3, 4, network=lambda a, b: nn.Linear(a, b + 1)), "network gives the shape"),
        (lambda: Hypernetwork(7, 5, 3, 4, network=nn.ReLU()), r"network is a ReLU, expected a factory \(Z, G\)"),
        (lambda: Pairwise((7,), 3), "got 1 streams"),
        (lambda: Pairwise(7, 5, 3), "Pairwise: features is 7, expected those of k ≥ 2 streams"),
        (lambda: SumOf(7, 5, 3, Additive, nn.Bilinear), "SumOf: second gives a Bilinear, expected a multint.Integ"),
        (lambda: SwappedOf(7, 5, 3, Diagonal), r"Diagonal: out_features is 3, expected x_features \(5\)"),
        (lambda: ScaledOf(7, 5, 3, "a", Additive), "ScaledOf: scale is 'a', expected a number"),
        (lambda: ThroughOf(7, 5, 3, Additive, Hadamard, 0), "ThroughOf: inner_features is 0, expected a whole number"),
        (lambda: ThroughOf(7, 5, 3, Additive, Hadamard, "y"), "ThroughOf: inner_features is 'y', expected .* or 'out'"),
        (lambda: Normalised(7, 5, 5, integrator=Product), "Normalised: Product has no product in an nn.Linear"),
        (lambda: Normalised(7, 5, 1), "Normalised: norm is the layer normalisation of one feature"),
        (lambda: Normalised(7, 5, 3, integrator=nn.Bilinear), "integrator gives a Bilinear, expected a multint.Integ"),
        (
            lambda: Hypernetwork(7, 5, 3, 4, head=lambda x, z, o: Additive(x, z, 5)),
            r"Hypernetwork: head gives a Additive of the sizes \(X, Z, O\) = \(7, 4, 5\), expected \(7, 4, 3\)",
        ),
        (lambda: Sum(Additive(7, 5, 3), nn.Linear(7, 3)), "Sum: got a Linear, expected an Integrator"),
        (lambda: Swapped(nn.Linear(7, 3)), "Swapped: got a Linear"),
        (lambda: float("nan") * Additive(7, 5, 3), "scale is nan, expected a number"),
        (lambda: Additive(7, 5, 3) + Additive(7, 5, 4), "expected equal ones"),
        (lambda: Additive(7, 5, 3) @ Hadamard(7, 5, 4), "inner's out_features is 4, expected outer's z_features, 5"),
        (lambda: Additive(7, 5, 3) @ Hadamard(8, 5, 5), "inner's x_features is 8"),
    ],
)
def test_wrong_settings_say_what_was_expected(make, message):
    with pytest.raises(MultintError, match=message):
        make()


@pytest.mark.parametrize(
    "operate",
    [
        lambda f: f + 1,
        lambda f: f - 1,
        lambda f: 1 - f,
        lambda f: f * "a",
        lambda f: f @ 2,
        lambda f: f * f,
        lambda f: f / f,
        lambda f: 1 / f,
    ],
)
def test_the_algebra_refuses_what_is_not_an_integrator(operate):
    with pytest.raises(TypeError):
        operate(Additive(7, 5, 3))


def test_compositions_that_are_not_bi_affine_have_no_terms():
    for f in (
        Gated(7, 5, 3) + Additive(7, 5, 3),
        2 * Gated(7, 5, 3),
        Swapped(Gated(7, 5, 3)),
        MultiplicativeIntegration(7, 4, 3) @ Additive(7, 5, 4),
    ):
        with pytest.raises(MultintError, match=r"has no terms\(\)"):
            f.terms()


def test_the_operators_build_the_named_compositions():
    f, g = randomise(Additive(7, 5, 5).double()), randomise(Hadamard(7, 5, 5).double(), seed=3)
    x, z = normal(6, 7), normal(6, 5, seed=2)
    assert isinstance(f + g, Sum)
    assert isinstance(f @ g, Through)
    torch.testing.assert_close((f + g)(x, z), f(x, z) + g(x, z))
    torch.testing.assert_close((0.3 * f)(x, z), 0.3 * f(x, z))
    torch.testing.assert_close((f - g)(x, z), f(x, z) - g(x, z))
    torch.testing.assert_close((-f)(x, z), -f(x, z))
    torch.testing.assert_close((f / 2)(x, z), f(x, z) / 2)
    torch.testing.assert_close((f - g / 4).terms()(x, z), f(x, z) - g(x, z) / 4)
    torch.testing.assert_close((f @ g)(x, z), f(x, g(x, z)))
    torch.testing.assert_close(Swapped(f)(z, x), f(x, z))


def test_a_hypernetwork_measures_its_network_without_a_trace():
    """In evaluation mode, without a draw from the global generator, and without a scale where it starts at 0."""

    def network(z, features):
        linear = nn.Linear(z, features)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.BatchNorm1d(z), nn.Dropout(0.5), linear)

    torch.manual_seed(0)
    f = Hypernetwork(7, 5, 3, 4, network=network)
    assert f.scale == 1.0
    assert f.network.training
    assert f.network[0].num_batches_tracked == 0


GENERATORS = {
    "default": {},
    "linear": {"network": nn.Linear},
    "sigmoid": {"network": lambda z, g: nn.Sequential(nn.Linear(z, g), nn.Sigmoid())},  # of a mean far from 0
    "deep": {"network": lambda z, g: nn.Sequential(nn.Linear(z, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, g))},
    "stack": {"network": lambda z, g: Context(Conditional(z, 3, g, hidden=16))},
}


class Context(nn.Module):
    """A generator with a learnt stream of its own."""

    def __init__(self, f):
        super().__init__()
        self.f, self.context = f, nn.Parameter(torch.randn(f.z_features))

    def forward(self, z):
        return self.f(z, self.context)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("head", [Bilinear, LowRank, Diagonal, Projected, MultiplicativeIntegration, Gated])
@pytest.mark.parametrize("width", [16, 128, 1024])
def test_a_generated_layer_starts_with_unit_variance_for_any_generator(generator, head, width):
    torch.manual_seed(0)
    settings = {"features": 16, "head": head} | GENERATORS[generator]
    layers = [Hypernetwork(width, 32, width, **settings) for _ in range({16: 12, 128: 4, 1024: 1}[width])]
    with torch.no_grad():
        variances = [f(torch.randn(64, width), torch.randn(64, 32)).var() for f in layers]
    assert 0.8 <= torch.stack(variances).mean() <= 1.2


def test_streams_that_broadcast_both_ways_take_the_small_intermediate():
    """x (512, 1, X) with z (1, 512, Z): their outer product would be 512² matrices."""
    with torch.device("meta"):  # nothing is computed
        f = Bilinear(64, 64, 64, z_term=False, x_term=False)
        x, z = torch.randn(512, 1, 64), torch.randn(1, 512, 64)
    with FlopCounterMode(display=False) as counter:
        f(x, z)
    assert counter.get_total_flops() < 512 * 512 * 64 * 64 * 3


@pytest.mark.parametrize("x_features", [2, 9])  # z's product with the weight is the smaller one, or x's
def test_blocks_are_bilinear_forms_beside_each_other(x_features):
    f = randomise(Bilinear(x_features, 12, 6, z_term=False, x_term=False, blocks=3).double())
    parts = [Bilinear(x_features, 4, 2, z_term=False, x_term=False, bias=None).double() for _ in range(3)]
    for part, weight in zip(parts, f.interaction.weight.chunk(3), strict=True):
        part.interaction.weight.data.copy_(weight)
    assert parameter_count(f) == 6 * 4 * x_features + 6
    for x, z in ((normal(5, x_features), normal(5, 12, seed=2)), (normal(2, 1, x_features), normal(5, 12, seed=2))):
        together = torch.cat([part(x, of_part) for part, of_part in zip(parts, z.chunk(3, -1), strict=True)], -1)
        torch.testing.assert_close(f(x, z), together + f.lower.bias, rtol=1e-10, atol=1e-10)


def test_ranks():
    torch.manual_seed(0)
    assert rank(Additive(7, 5, 3)) == (0, 0, 0)
    assert rank(Bilinear(7, 5, 3)) == (3, 5, 7)
    assert rank(LowRank(9, 8, 7, rank=3)) == (3, 3, 3)
    assert rank(LowRank(60, 40, 20, rank=4)) == (4, 4, 4)
    assert rank(Tucker(9, 8, 7, x_rank=3, z_rank=2)) == (6, 2, 3)
    with pytest.raises(MultintError, match="not bi-affine"):
        rank(Gated(7, 5, 3))


features = st.integers(1, 80)


@given(x=features, z=features, o=features)
@settings(max_examples=50, deadline=None)
def test_what_is_not_given_is_within_the_size_of_an_additive_block(x, z, o):
    with torch.device("meta"):
        low_rank, tucker = LowRank(x, z, o), Tucker(x, z, o)
    factors = low_rank.x_factor, low_rank.z_factor, low_rank.out_factor
    assert low_rank.rank == 1 or sum(parameter_count(factor) for factor in factors) <= o * (x + z)
    assert parameter_count(tucker.core) <= o * (x + z)
    assert tucker.x_rank <= x
    assert tucker.z_rank <= z
    head = Hypernetwork(x, z, o).head
    assert head.z_features == 4 or parameter_count(head.interaction) <= o * (x + z)


def test_what_is_not_given_stays_the_same_number():
    """A checkpoint of a network that was named in one word is rebuilt by this rule."""
    sizes = (64, 256, 1024)
    tucker = Tucker(*sizes)
    assert (LowRank(*sizes).rank, tucker.x_rank, tucker.z_rank, Hypernetwork(*sizes).features) == (243, 17, 17, 5)
    assert (Tucker(3, 256, 8).x_rank, Tucker(256, 3, 8, x_rank=5).x_rank, Hypernetwork(64, 64, 8).features) == (3, 5, 4)


def test_counts():
    f = LowRank(9, 8, 7, rank=3)
    assert parameter_count(f) == 3 * 9 + 3 * 8 + 7 * 3 + 7 * 8 + 7 * 9 + 7
    assert flops(f) == 2 * (3 * 9 + 3 * 8 + 7 * 3 + 7 * 8 + 7 * 9)
    assert flops(Pairwise((4, 3), 5)) == 2 * 5 * (4 + 3)
    assert parameter_count(f + f) == parameter_count(f), "a shared parameter counts once"
    # The smallest intermediate first: one product with W, one small one beside it.
    assert flops(Bilinear(4, 3, 50, False, False)) == 2 * 50 * 4 * 3


def test_every_public_integrator_is_in_the_catalogue():
    def parts(f):
        return {type(module) for module in f.modules() if isinstance(module, Integrator)}

    catalogued = set().union(*(parts(build(name)) for name in INTEGRATORS))
    exported = [*vars(multint).values(), *vars(multint.integrators).values()]
    public = {value for value in exported if isinstance(value, type) and issubclass(value, Integrator)}
    assert public - {Integrator, BiAffine} <= catalogued


def test_outermost_integrators_leave_out_the_parts_of_others():
    f = Additive(7, 5, 5) @ Hadamard(7, 5, 5)
    assert outermost_integrators(f) == {"": f}
    assert outermost_integrators(nn.Sequential(f, nn.Linear(2, 2), f.inner)) == {"0": f}
    assert list(outermost_integrators(nn.ModuleDict({"a": f.inner, "ab": f.outer}))) == ["a", "ab"]


def test_partial_factories_take_the_three_sizes():
    f = partial(LowRank, rank=2)(7, 5, 3)
    assert (f.x_features, f.z_features, f.out_features, f.rank) == (7, 5, 3, 2)
