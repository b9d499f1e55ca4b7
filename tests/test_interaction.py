"""How much of an integrator's output neither stream explains alone."""

import math

import numpy as np
import pytest
import torch

from multint.errors import ShapeError
from multint.integrators import (
    Additive,
    Bilinear,
    Gated,
    Hadamard,
    Integrator,
    MultiplicativeIntegration,
    Normalised,
    SumOf,
    ThroughOf,
    interaction,
    measures,
)
from tests.catalogue import INTEGRATORS, normal, randomise

SIZES = 5, 4, 6
X, Z = 2 * normal(40, 5) + 1, normal(30, 4, seed=1) - 0.5


def random(form, *sizes, **settings):
    torch.manual_seed(0)
    return randomise(form(*(sizes or SIZES), **settings)).double()


def by_analysis_of_variance(f, x, z):
    """The same by NumPy from the table of all pairs."""
    with torch.no_grad():
        table = f.double()(x[:, None], z[None]).numpy()
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean((0, 1))
    return np.square(rest).mean((0, 1)).sum() / table.var((0, 1)).sum()


@pytest.mark.parametrize("name", INTEGRATORS)
def test_it_is_what_the_table_of_all_pairs_leaves(name):
    case = INTEGRATORS[name]
    f = random(case.build, *((5, 4, 5) if case.square else SIZES)).eval()
    assert interaction(f, X, Z) == pytest.approx(by_analysis_of_variance(f, X, Z), abs=1e-9)


def test_additive_streams_do_not_interact():
    assert interaction(random(Additive), X, Z) == pytest.approx(0, abs=1e-12)


def test_a_product_of_centred_streams_is_interaction_alone():
    f = random(Hadamard)
    assert interaction(f, X - X.mean(0), Z - Z.mean(0)) == pytest.approx(1, abs=1e-12)
    assert interaction(f, X, Z) < 0.9, "what the product brings with a mean is the other stream's own"


def test_of_one_feature_it_is_the_share_of_alpha():
    """Of unit variances, α² of α² + β1² + β2²."""
    f = MultiplicativeIntegration(1, 1, 1, alpha=3.0, beta1=2.0, beta2=1.0).double()
    for weight in (f.x_projection.weight, f.z_projection.weight):
        weight.data.fill_(1)
    stream = torch.tensor([[-1.0], [1.0]])
    assert interaction(f, stream, stream) == pytest.approx(9 / 14)


def test_large_dense_forms_and_compositions_without_one_go_by_pairs(monkeypatch):
    f, g = random(Bilinear), random(SumOf, first=Additive, second=Gated)
    of_f = interaction(f, X, Z)
    h = random(ThroughOf, outer=Bilinear, inner=Additive, inner_features=3)
    assert interaction(h, X, Z) == pytest.approx(by_analysis_of_variance(h, X, Z))
    assert interaction(g, X, Z) == pytest.approx(by_analysis_of_variance(g, X, Z))
    monkeypatch.setattr(measures, "_DENSE", 0)
    assert interaction(f, X, Z) == pytest.approx(of_f)


def test_a_large_mean_costs_no_digits():
    f = random(MultiplicativeIntegration)
    f.bias.data += 1e6
    assert interaction(f, X, Z) == pytest.approx(by_analysis_of_variance(f, X - 0, Z), rel=1e-6)


def test_leading_shapes_are_rows_and_nothing_is_changed():
    f = random(Gated).float().train()
    before = [parameter.clone() for parameter in f.parameters()]
    assert interaction(f, X.view(4, 10, 5), Z) == pytest.approx(interaction(f, X, Z))
    torch.testing.assert_close([*f.parameters()], before, rtol=0, atol=0)
    assert {parameter.dtype for parameter in f.parameters()} == {torch.float32}
    assert f.training


def test_it_is_that_of_evaluation():
    """By dropout, y would be no function of its streams."""
    f = random(Normalised.of(Additive, norm=lambda features: torch.nn.Dropout(0.5))).train()
    assert interaction(f, X, Z) == pytest.approx(0, abs=1e-12)


def test_what_never_changes_has_no_share():
    assert math.isnan(interaction(random(Additive), torch.zeros(9, 5), torch.zeros(9, 4)))


@pytest.mark.parametrize(("x", "z", "what"), [(X[:1], Z, "x has the shape"), (X, Z[:, :3], "z has the shape")])
def test_streams_that_do_not_fit_are_refused(x, z, what):
    f: Integrator = random(Additive)
    with pytest.raises(ShapeError, match=f"interaction: {what}"):
        interaction(f, x, z)
