"""What PyTorch does to modules from outside: functional calls, higher derivatives, autocast, compilation."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from multint import GRU, LSTM, RNN, Additive, Bilinear, MultiplicativeIntegration
from multint.cells import LSTMState
from multint.integrators import Normalised
from tests.catalogue import CELLS, INTEGRATORS, Sizes, initial_state, layer, normal

pytestmark = pytest.mark.compiles

every_cell = pytest.mark.parametrize("cell", CELLS)
KINDS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


@every_cell
def test_functional_call_uses_the_given_weights(cell):
    rnn, other = layer(cell), layer(cell)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    xs = normal(4, 2, 5)
    output, _ = torch.func.functional_call(rnn, dict(other.named_parameters()), (xs,))
    torch.testing.assert_close(output, other(xs)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_calls_and_gradients_reach_dropped_weights(kind):
    rnn = KINDS[kind](5, 7, weight_drop=0.3).double()
    xs = normal(4, 2, 5)
    weights = {name: p.detach().clone() for name, p in rnn.named_parameters()}
    torch.manual_seed(0)
    expected, _ = rnn(xs)
    torch.manual_seed(0)
    output, _ = torch.func.functional_call(rnn, weights, (xs,))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)

    def loss(weights):
        return torch.func.functional_call(rnn, weights, (xs,))[0].sum()

    gradients = torch.func.grad(loss)(weights)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("cell", ["rnn-mi", "lstm-mi", "lstm-norm", "gru-mi", "gru-after", "own-leaky"])
def test_double_backward(cell):
    rnn = layer(cell)
    assert torch.autograd.gradcheck(lambda xs: rnn(xs)[0], normal(3, 2, 5, requires_grad=True), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda xs: rnn(xs)[0], normal(2, 1, 5, requires_grad=True), fast_mode=True)


def test_per_sample_gradients_by_vmap():
    rnn = layer("lstm-mi")
    parameters = dict(rnn.named_parameters())
    xs = normal(4, 3, 5)

    def loss(weights, one):
        return torch.func.functional_call(rnn, weights, (one,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, xs)
    whole = torch.func.grad(loss)(parameters, xs)
    for name, gradient in whole.items():
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-10, atol=1e-10)


@every_cell
def test_bf16_autocast_keeps_the_products_dtype(cell):
    """No float32 vector promotes the state: h is bfloat16, and an LSTM's memory c stays float32."""
    rnn = layer(cell).float()
    xs, state = normal(6, 3, 5).float(), initial_state(rnn, 3)
    expected, _ = rnn(xs, state)
    with torch.autocast("cpu", torch.bfloat16):
        output, final = rnn(xs, state)
        again, _ = rnn(xs, final)
    assert output.dtype == again.dtype == torch.bfloat16
    if isinstance(final, LSTMState):
        assert final.c.dtype == torch.float32
    rms = (output.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert rms < 0.1
    output.float().square().sum().backward()
    gradients = [p.grad for p in rnn.parameters() if p.requires_grad]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_regularised_layers_keep_their_dtypes_under_autocast(kind):
    noise = dict.fromkeys(("zoneout", "state_dropout", "input_dropout", "weight_drop", "weight_noise"), 0.2)
    rnn = KINDS[kind](5, 7, 2, integrator=Normalised, **noise)
    for training in (True, False):
        rnn.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = rnn(torch.randn(6, 3, 5), lengths=[6, 2, 3], reset=torch.rand(6, 3) < 0.3)
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()


def test_float16_does_not_overflow_in_the_product_of_two_activations():
    """Saturating gates absorb values near float16's largest, 65504, where the products with W and U are in range."""
    rnn = LSTM(64, 32, integrator=MultiplicativeIntegration)
    xs = 200 * torch.randn(20, 4, 64)
    with torch.autocast("cpu", torch.float16):
        output, _ = rnn(xs)
    assert output.isfinite().all()


def test_weights_in_bfloat16_work_alone():
    rnn = LSTM(5, 7, integrator=Bilinear).to(torch.bfloat16)
    output, (h, c) = rnn(torch.randn(4, 2, 5, dtype=torch.bfloat16))
    assert {output.dtype, h.dtype, c.dtype} == {torch.bfloat16}


def test_no_grad_and_inference_mode_give_the_same_numbers():
    rnn = layer("lstm-mi")
    xs = normal(4, 2, 5)
    expected, _ = rnn(xs)
    with torch.no_grad():
        torch.testing.assert_close(rnn(xs)[0], expected, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(rnn(xs)[0], expected.detach(), rtol=1e-10, atol=1e-10)


def test_one_module_used_twice_sums_its_gradients():
    rnn = layer("gru-mi")
    first, second = normal(4, 2, 5), normal(3, 2, 5, seed=7)
    rnn(first)[0].sum().backward()
    rnn(second)[0].sum().backward()
    apart = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    (rnn(first)[0].sum() + rnn(second)[0].sum()).backward()
    torch.testing.assert_close([p.grad for p in rnn.parameters()], apart, rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_a_carried_state():
    rnn, xs = layer("lstm-mi"), normal(4, 2, 5, requires_grad=True)
    _, state = rnn(xs[:2])
    output, _ = rnn(xs[2:], state)
    (carried,) = torch.autograd.grad(output.sum(), xs)
    whole, _ = rnn(xs)
    (expected,) = torch.autograd.grad(whole[2:].sum(), xs)
    torch.testing.assert_close(carried, expected, rtol=1e-10, atol=1e-10)


def test_frozen_parameters_get_no_gradient():
    rnn = RNN(5, 7, integrator=Additive)
    frozen = rnn.directions[0].cell.integrator.z_projection.weight.requires_grad_(False)
    rnn(torch.randn(4, 2, 5))[0].sum().backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in rnn.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["mi", "bilinear", "hypernetwork", "sum", "through-krause", "swapped"])
def test_integrators_are_traced_and_compiled_whole(name):
    f = INTEGRATORS[name](Sizes(7, 5, 3)).double()
    torch.compiler.reset()  # all integrators share one `forward`, and recompilations of one function are limited
    whole = torch.compile(f, backend="eager", fullgraph=True)
    for x, z in ((normal(4, 7), normal(4, 5, seed=2)), (normal(2, 1, 7), normal(4, 5, seed=2))):
        torch.testing.assert_close(whole(x, z), f(x, z), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(make_fx(f)(x, z)(x, z), f(x, z), rtol=1e-10, atol=1e-10)


# Dynamo warns of what it does itself: it looks at a result's .grad.
@pytest.mark.filterwarnings("default")
def test_compiled_module_gives_the_same_numbers():
    rnn = layer("lstm-mi")
    xs = normal(3, 2, 5)
    compiled = torch.compile(rnn, backend="eager")
    torch.testing.assert_close(compiled(xs)[0], rnn(xs)[0], rtol=1e-10, atol=1e-10)
