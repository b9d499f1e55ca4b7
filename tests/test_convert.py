"""From one bi-affine form to another: exact where the form can hold it, and the error that is told elsewhere."""

from functools import partial

import pytest
import torch

from multint.errors import FormError, OptionTypeError
from multint.integrators import (
    Additive,
    Bilinear,
    Concat,
    Diagonal,
    Gated,
    Hadamard,
    Krause,
    LowRank,
    MultiplicativeIntegration,
    Tucker,
    convert,
)
from tests.catalogue import normal, randomise

SIZES = 7, 6, 8


def random(form, sizes=SIZES, **settings):
    torch.manual_seed(0)
    return randomise(form(*sizes, **settings)).double()


def difference(f, g):
    """The root of the mean square of the outputs' difference relative to f's outputs, by the dense forms."""
    pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(g.terms(), f.terms(), strict=True)]
    left, whole = sum((a - b).square().sum() for a, b in pairs), sum(b.square().sum() for _, b in pairs)
    return (left / whole).sqrt().item()


EXACT = {
    "additive-as-concat": (Additive, Concat, {}),
    "concat-as-additive": (Concat, Additive, {}),
    "additive-as-low-rank": (Additive, LowRank, {"rank": 2}),
    "mi-as-full": (MultiplicativeIntegration, Bilinear, {}),
    "low-rank-as-full": (partial(LowRank, rank=3), Bilinear, {}),
    "sum-as-full": (lambda *sizes: Additive(*sizes) + 0.5 * Hadamard(*sizes), Bilinear, {}),
    "low-rank-as-itself": (partial(LowRank, rank=3), LowRank, {"rank": 3}),
    "of-all-inputs": (partial(LowRank, rank=7), LowRank, {"rank": 7}),
    "low-rank-as-tucker": (partial(LowRank, rank=3), Tucker, {"x_rank": 3, "z_rank": 3}),
    "tucker-as-itself": (partial(Tucker, x_rank=3, z_rank=2), Tucker, {"x_rank": 3, "z_rank": 2}),
    "tucker-as-full": (partial(Tucker, x_rank=3, z_rank=2), Bilinear, {}),
    "blocks-as-full": (partial(Bilinear, blocks=2), Bilinear, {}),
    "blocks-as-themselves": (partial(Bilinear, blocks=2), Bilinear, {"blocks": 2}),
    "full-as-tucker": (Bilinear, Tucker, {"x_rank": 7, "z_rank": 6}),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_form_that_can_hold_it_gives_it_back(name):
    form, other, settings = EXACT[name]
    f = random(form)
    before = [parameter.clone() for parameter in f.parameters()]
    g, error = convert(f, other, **settings)
    assert type(g) is other
    assert error < 1e-10
    x, z = normal(5, SIZES[0]), normal(5, SIZES[1], seed=1)
    torch.testing.assert_close(g(x, z), f(x, z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close([*f.parameters()], before, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 5), (4, 1, 5), (4, 5, 1), (2, 2, 9)], ids=str)
@pytest.mark.parametrize("form", [partial(LowRank, rank=1), partial(Tucker, x_rank=1, z_rank=1)], ids=["cp", "tucker"])
def test_of_few_features(form, sizes):
    assert convert(random(form, sizes), form).error < 1e-10


def test_the_interaction_is_what_an_additive_form_leaves_out():
    f = random(Bilinear)
    g, error = convert(f, Additive)
    W, *others = f.terms()
    assert error == pytest.approx((W.square().sum() / sum(t.square().sum() for t in (W, *others))).sqrt().item())
    torch.testing.assert_close([*g.terms()][1:], others)


def test_blocks_keep_what_is_within_them():
    f = random(Bilinear, z_term=False, x_term=False, bias=None)
    g, error = convert(f, Bilinear, blocks=2, z_term=False, x_term=False, bias=None)
    W = f.terms().W.clone()
    W[:4, 3:] = W[4:, :3] = 0
    torch.testing.assert_close(g.terms().W, W)
    assert error == pytest.approx(difference(f, g))


def test_a_tucker_form_of_one_stream_is_the_singular_value_decompositions():
    """With the rank of the other stream whole, what is left out are the unfolding's last singular values."""
    f = random(Bilinear, z_term=False, x_term=False, bias=None)
    values = torch.linalg.svdvals(f.terms().W.flatten(0, 1))
    error = convert(f, Tucker, x_rank=3, z_rank=6, z_term=False, x_term=False, bias=None).error
    assert error == pytest.approx((values[3:].square().sum() / values.square().sum()).sqrt().item())


def test_a_low_rank_form_of_few_outputs_is_the_singular_value_decompositions():
    """Of one output the tensor is a matrix, whose nearest of a rank is known."""
    f = random(Bilinear, (7, 6, 1), z_term=False, x_term=False, bias=None)
    values = torch.linalg.svdvals(f.terms().W[0])
    for rank in (1, 2, 5):
        error = convert(f, LowRank, rank=rank, z_term=False, x_term=False, bias=None).error
        assert error == pytest.approx((values[rank:].square().sum() / values.square().sum()).sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("form", [LowRank, Tucker])
def test_more_rank_is_nearer(form):
    f, errors = random(Bilinear), []
    for rank in (1, 2, 4, 6):
        settings = {"rank": rank} if form is LowRank else {"x_rank": rank, "z_rank": rank}
        g, error = convert(f, form, **settings)
        assert error == pytest.approx(difference(f, g))
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.4 * errors[-1]


def test_the_error_is_that_of_the_outputs():
    """For streams of mean 0 and covariance I."""
    f = random(MultiplicativeIntegration)
    g, error = convert(f, LowRank, rank=4)
    x, z = normal(200_000, SIZES[0]), normal(200_000, SIZES[1], seed=1)
    y = f(x, z)
    assert error == pytest.approx(((g(x, z) - y).square().sum() / y.square().sum()).sqrt().item(), rel=0.02)


def test_a_product_that_is_not_used_can_still_be_learnt():
    g, error = convert(random(Additive), LowRank, rank=2)
    assert error < 1e-10
    g(normal(5, SIZES[0]), normal(5, SIZES[1], seed=1)).square().sum().backward()
    assert g.out_factor.weight.grad.abs().min() > 0


@pytest.mark.parametrize("form", [Additive, Bilinear, LowRank, Tucker])
def test_numbers_that_are_not_finite_are_refused(form):
    f = random(Bilinear)
    f.interaction.weight.data[0, 0, 0] = torch.nan
    with pytest.raises(FormError, match="convert: the dense form of Bilinear holds numbers that are not finite"):
        convert(f, form)


@pytest.mark.parametrize("form", ["LowRank", Bilinear(3, 4, 5)], ids=["a name", "a module"])
def test_what_is_no_form_is_refused(form):
    with pytest.raises(OptionTypeError, match=r"form is a .*, expected a factory"):
        convert(Additive(3, 4, 5), form)


def test_it_keeps_the_dtype_and_is_the_same_again():
    f = random(Bilinear).float()
    found = [convert(f, LowRank, rank=3).integrator for _ in range(2)]
    assert {parameter.dtype for parameter in found[0].parameters()} == {torch.float32}
    torch.testing.assert_close([*found[0].parameters()], [*found[1].parameters()])


@pytest.mark.parametrize(
    ("f", "form", "message"),
    [
        (Gated(3, 4, 5), Bilinear, "Gated is not bi-affine"),
        (Additive(3, 4, 5) + Gated(3, 4, 5), Bilinear, "Gated is not bi-affine"),
        (Additive(3, 4, 3), Diagonal, "convert: no way to a Diagonal is known, expected Additive, Concat, Bilinear"),
        (Additive(3, 4, 5), Krause, "convert: no way to a Krause"),
    ],
    ids=str,
)
def test_what_has_no_way_is_refused(f, form, message):
    with pytest.raises(FormError, match=message):
        convert(f, form)
