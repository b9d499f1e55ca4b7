"""The products have the numbers and derivatives of `mm`, by whichever library and whatever of torch is missing."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from multint import Bilinear, Hadamard, LSTMCell, onednn, scan
from multint.engines.kernel import eager_pieces
from multint.products import (
    differentiable_product,
    prepared_product,
    untracked_product,
    untracked_transposed_product,
)
from tests.catalogue import normal

ROWS, INNER, OUTER = 160, 132, 164  # from 2^21 multiply-adds on, oneDNN multiplies; all three products have more
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# How the numbers of a matrix can lie in memory.
LAYOUTS = {
    "dense": lambda m: m.contiguous(),
    "transposed": lambda m: m.t().contiguous().t(),
    "columns": lambda m: torch.stack([m, m], 2).flatten(1)[:, ::2],
    "part": lambda m: torch.cat([m, m, m], 1)[:, m.shape[1] : 2 * m.shape[1]],
    "shifted": lambda m: torch.cat([m.new_zeros(1), m.flatten()])[1:].view(m.shape),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def factors(dtype, layout="dense", **options):
    """Left (N, I) and right (I, O); float64 ones hold the numbers of the lower dtype exactly."""
    shapes = ((ROWS, INNER), (INNER, OUTER))
    return [LAYOUTS[layout](normal(*shape, seed=i).to(dtype)).requires_grad_() for i, shape in enumerate(shapes)]


def exact(tensors):
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


def assert_near(actual, expected, dtype):
    """Equal but for rounding, by the norm: single numbers near 0 are off by more."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=TOLERANCE[dtype])


@pytest.fixture(autouse=True)
def away(monkeypatch):
    """As on a processor of another maker than MKL's, whose products would all be mm."""
    monkeypatch.setattr(onednn, "mkl_is_at_home", lambda: False)


def test_mkl_multiplies_on_its_makers_processor(monkeypatch, calls):
    monkeypatch.setattr(onednn, "mkl_is_at_home", lambda: True)
    left, right = factors(torch.float32)
    torch.testing.assert_close(differentiable_product(left, right), left @ right, rtol=0, atol=0)
    assert calls == []


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what oneDNN is given to multiply, its trial left out."""
    for dtype in TOLERANCE:
        onednn.multiplies(dtype)
    taken = []
    original = onednn.linear

    def linear(left, weight):
        taken.append((tuple(left.shape), weight.dtype))
        return original(left, weight)

    monkeypatch.setattr(onednn, "linear", linear)
    return taken


@pytest.fixture
def untried():
    """No part of torch has been tried yet, neither before nor after."""
    onednn.multiplies.cache_clear()
    yield
    onednn.multiplies.cache_clear()


def derivatives(function, left, right):
    """The value; the first derivatives; the second ones, of each first derivative through each factor."""
    result = function(left, right)
    first = torch.autograd.grad(result.square().sum(), (left, right), create_graph=True)
    second = [d for one in first for d in torch.autograd.grad(one.square().sum(), (left, right), retain_graph=True)]
    return [result, *first, *second]


@every_dtype
@every_layout
def test_values_and_derivatives_are_those_of_mm(dtype, layout):
    given = factors(dtype, layout)
    expected = derivatives(torch.mm, *exact(given))
    for actual, right_one in zip(derivatives(differentiable_product, *given), expected, strict=True):
        assert_near(actual, right_one, dtype)


@every_dtype
def test_the_first_derivatives_alone(dtype):
    """Without create_graph they are taken outside autograd."""
    given = factors(dtype)
    doubles = exact(given)
    actual = torch.autograd.grad(differentiable_product(*given).square().sum(), given)
    expected = torch.autograd.grad((doubles[0] @ doubles[1]).square().sum(), doubles)
    for one, right_one in zip(actual, expected, strict=True):
        assert not one.requires_grad
        assert_near(one, right_one, dtype)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_factor_costs_no_product(frozen, calls):
    given = factors(torch.float32)
    given[frozen].requires_grad_(False)
    doubles = exact(given)
    (actual,) = torch.autograd.grad(differentiable_product(*given).square().sum(), given[1 - frozen])
    (expected,) = torch.autograd.grad((doubles[0] @ doubles[1]).square().sum(), doubles[1 - frozen])
    assert_near(actual, expected, torch.float32)
    if onednn.multiplies(torch.float32):
        assert len(calls) == 2


@every_dtype
@every_layout
def test_the_untracked_ones_agree_with_mm(dtype, layout):
    left, right = (factor.detach() for factor in factors(dtype, layout))
    a, b = exact([left, right])
    assert_near(untracked_product(left, right), a @ b, dtype)
    for one, other in ((left, left @ right), (left @ right, left)):  # the smaller first, and the larger
        expected = one.double().t() @ other.double()
        assert_near(untracked_transposed_product(one, other), expected, dtype)
    for times in (1, 100):
        prepared = prepared_product(right, ROWS, times)
        for rows in (left, left.flip(0)):
            assert_near(prepared(rows), rows.double() @ b, dtype)


@every_dtype
def test_the_smaller_factor_is_copied(dtype, calls):
    if not onednn.multiplies(dtype):
        pytest.skip(f"oneDNN does not multiply {dtype} here")
    small, large = torch.randn(500, 70).to(dtype), torch.randn(500, 90).to(dtype)
    untracked_transposed_product(small, large)
    untracked_transposed_product(large, small)
    assert calls == [((70, 500), dtype)] * 2
    weight = torch.randn(90, 70).to(dtype).requires_grad_()
    torch.autograd.grad(differentiable_product(large, weight).sum(), weight)
    assert calls[2:] == [((500, 90), dtype), ((70, 500), dtype)]


@every_dtype
def test_onednn_takes_the_large_ones_alone(dtype, calls, monkeypatch):
    if not onednn.multiplies(dtype):
        pytest.skip(f"oneDNN does not multiply {dtype} here")
    left, right = (factor.detach() for factor in factors(dtype))
    for multiply in (differentiable_product, untracked_product, lambda a, b: prepared_product(b, len(a), 1)(a)):
        del calls[:]
        multiply(torch.ones(128, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype))  # just large enough
        assert calls == [((128, 128), dtype)]
        del calls[:]
        multiply(torch.ones(127, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype))
        multiply(left.double(), right.double())
        with monkeypatch.context() as without:
            without.setattr(torch.backends.mkldnn, "enabled", False)
            multiply(left, right)
        assert calls == []


def test_many_products_with_one_matrix_bring_it_in_order_first(monkeypatch):
    reordered = []
    original = onednn.reorder
    monkeypatch.setattr(onednn, "reorder", lambda *a: reordered.append(a[1]) or original(*a))
    if not onednn.multiplies(torch.float32):
        pytest.skip("oneDNN does not multiply here")
    _, right = (factor.detach() for factor in factors(torch.float32))
    del reordered[:]
    for times in (1, 7, 8, 9):
        prepared_product(right, ROWS, times)
    assert reordered == [ROWS] * 2


def test_what_does_not_fit_is_the_error_of_mm():
    left, right = factors(torch.float32)
    for wrong in (left[:, 1:], left.bfloat16(), left.double()):
        with pytest.raises(RuntimeError) as expected:
            wrong @ right
        with pytest.raises(RuntimeError) as raised:
            differentiable_product(wrong, right)
        assert str(raised.value) == str(expected.value)


def test_autocast_chooses_the_dtype_as_it_does_for_mm():
    given = factors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = differentiable_product(*given), given[0] @ given[1]
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(result.float().square().sum(), given)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.float().square().sum(), given), rtol=0, atol=0)


# Transforms have rules for mm and none for a function of our own.
TRANSFORMS = {
    "vmap": lambda f, a, b: vmap(f, in_dims=(0, None))(torch.stack([a, -a]), b),
    "grad": lambda f, a, b: grad(lambda *both: f(*both).square().sum(), argnums=1)(a, b),
    "jvp": lambda f, a, b: jvp(f, (a, b), (a.flip(0), b.flip(0)))[1],
    "vmap of grad": lambda f, a, b: vmap(lambda z: grad(lambda x: f(x, b).square().sum())(z))(torch.stack([a, -a])),
}


@every_dtype
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch_transforms(transform, dtype):
    left, right = (factor.detach() for factor in factors(dtype))
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(differentiable_product, left, right), apply(torch.mm, left, right), rtol=0, atol=0)


def test_forward_differentiation():
    left, right = (factor.detach() for factor in factors(torch.float32))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(left, left.flip(0))
        result = forward_ad.unpack_dual(differentiable_product(dual, right))
    torch.testing.assert_close(result.primal, left @ right, rtol=0, atol=0)
    torch.testing.assert_close(result.tangent, left.flip(0) @ right, rtol=0, atol=0)


def test_a_compiled_function_holds_a_plain_product():
    given = [factor.detach() for factor in factors(torch.float32)]
    compiled = torch.compile(differentiable_product, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), torch.mm(*given), rtol=0, atol=0)


class Raising:
    @staticmethod
    def default(*arguments):
        raise RuntimeError("could not create a primitive descriptor")


def off_by_one(name):
    original = getattr(torch.ops.mkldnn, name)

    def wrong(*arguments):
        return original(*arguments) + 1

    wrong.default = wrong
    return wrong


def never(*arguments):
    raise AttributeError


FAULTS = {
    "no linear": lambda: ("_linear_pointwise", SimpleNamespace()),
    "linear raises": lambda: ("_linear_pointwise", Raising),
    "linear is wrong": lambda: ("_linear_pointwise", off_by_one("_linear_pointwise")),
    "no reorder": lambda: ("_reorder_linear_weight", never),
    "reorder is wrong": lambda: ("_reorder_linear_weight", lambda weight, rows: -weight),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_onednn_products_are_plain(fault, monkeypatch, untried):
    monkeypatch.setattr(torch.ops.mkldnn, *FAULTS[fault]())
    test_values_and_derivatives_are_those_of_mm(torch.float32, "transposed")
    test_the_untracked_ones_agree_with_mm(torch.float32, "columns")
    assert not onednn.multiplies(torch.float32)
    bilinear = Bilinear(64, 64, 64)
    x, z = torch.randn(64, 64), torch.randn(64, 64)
    expected = bilinear.double()(x.double(), z.double())
    assert_near(bilinear.float()(x, z), expected.detach(), torch.float32)
    cell, xs = LSTMCell(5, 128, integrator=Hadamard), torch.randn(9, 40, 5)
    state = cell.initial_state(40)
    with eager_pieces():
        outcomes = []
        for engine in ("fused", "loop"):
            output, _ = scan(cell, xs, state, engine=engine)
            outcomes.append([output, *torch.autograd.grad(output.square().sum(), list(cell.parameters()))])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


def test_a_verdict_is_for_good(monkeypatch, untried):
    with monkeypatch.context() as broken:
        broken.setattr(torch.ops.mkldnn, "_linear_pointwise", Raising)
        assert not onednn.multiplies(torch.float32)
    assert not onednn.multiplies(torch.float32)


def test_bf16_is_plain_where_torch_does_not_report_it(monkeypatch, untried):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not onednn.multiplies(torch.bfloat16)
    test_values_and_derivatives_are_those_of_mm(torch.bfloat16, "dense")


def test_no_onednn_in_this_torch(monkeypatch, untried):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn.multiplies(torch.float32)


@pytest.mark.parametrize("part", ["functorch", "forward_ad"])
def test_a_torch_that_does_not_tell_what_is_active_gets_plain_products(part, monkeypatch, calls):
    if part == "functorch":
        monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    else:
        monkeypatch.delattr(forward_ad, "_current_level")
    left, right = (factor.detach() for factor in factors(torch.float32))
    torch.testing.assert_close(differentiable_product(left, right), left @ right, rtol=0, atol=0)
    assert calls == []


def test_the_trial_knows_nothing_of_its_caller(untried):
    """The first product of all may be one that is traced, differentiated or cast: the verdict is the same."""
    verdict = onednn.multiplies(torch.float32)
    contexts = {
        "fake tensors": FakeTensorMode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode(),
        "forward differentiation": forward_ad.dual_level(),
        "device": torch.device("meta"),
    }
    for name, context in contexts.items():
        onednn.multiplies.cache_clear()
        with context:
            assert onednn.multiplies(torch.float32) == verdict, name
    onednn.multiplies.cache_clear()
    vmap(lambda x: x if onednn.multiplies(torch.float32) == verdict else None)(torch.zeros(2))


def test_the_trial_leaves_the_random_numbers_alone(untried):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    onednn.multiplies(torch.float32)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
