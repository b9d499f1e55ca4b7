"""An existing network's layers made conditional: as it was at the start, and FiLM by hand afterwards."""

import copy
import io
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.checkpoint import checkpoint

from multint import (
    Additive,
    Bilinear,
    Conditional,
    Diagonal,
    Gated,
    Hypernetwork,
    LowRank,
    MultintError,
    MultiplicativeIntegration,
    condition,
)
from multint.conditional.network import Correction
from tests.catalogue import normal, randomise

C = 3
FORMS = {
    "film": Diagonal,
    "generated film": partial(Hypernetwork, features=4, head=Diagonal),
    "additive": Additive,
    "mi": MultiplicativeIntegration,
    "low-rank": partial(LowRank, rank=2),
    "bilinear": Bilinear,
    "gated": Gated,
    "stack": partial(Conditional, hidden=4, layers=2),
}


class Block(nn.Module):
    """A residual block, as in torchvision's networks."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ConvNet(nn.Module):
    def __init__(self, channels=4, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.head = nn.Linear(4 * channels, classes)

    def forward(self, images):
        return self.head(adaptive_avg_pool2d(self.blocks(self.stem(images)), 2).view(images.shape[0], -1))


def conv_net():
    torch.manual_seed(0)
    return ConvNet().double().eval(), normal(6, 2, 5, 5)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double(), normal(6, 4)


def volumes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 2), nn.GroupNorm(2, 4), nn.Conv3d(4, 3, 1)).double(), normal(6, 2, 3, 4, 5)


def sequences():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval(), normal(6, 5, 8)


NETWORKS = {"conv net": conv_net, "mlp": mlp, "volumes": volumes}
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
c = normal(6, C, seed=3)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def conditioned(network, **settings):
    """A network that its context has changed already."""
    net, x = network()
    f = condition(net, C, **settings)
    randomise(f.integrators)
    return f, x


@every_network
@pytest.mark.parametrize("form", FORMS)
def test_it_starts_as_it_was_and_learns_at_once(network, form):
    net, x = network()
    expected = net(x)
    f = condition(net, C, FORMS[form])
    y = f(x, context=c)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    for integrator in f.integrators:
        is_corrected = isinstance(integrator, Correction)
        assert is_corrected == (form not in ("film", "generated film"))
        reached = [integrator.rate] if is_corrected else [integrator.get_parameter(n) for n in integrator.z_weights]
        assert any(parameter.grad.any() for parameter in reached)
    with torch.no_grad():
        for parameter in f.integrators.parameters():
            parameter.sub_(0.1 * torch.ones_like(parameter) if parameter.grad is None else 0.1 * parameter.grad)
    assert not torch.allclose(f(x, context=c), f(x, context=-c))


def film(f, k, y):
    """The k-th layer's FiLM by hand, for features in dimension 1."""
    g = f.integrators[k]
    scale, shift = (
        (c @ p.weight.T + b).reshape(len(c), -1, *[1] * (y.ndim - 2))
        for p, b in ((g.scale_projection, g.scale_bias), (g.shift_projection, g.shift_bias))
    )
    return scale * y + shift


def test_film_in_an_mlp():
    f, x = conditioned(mlp)
    y = x
    for k, layer in enumerate((f.module[0], f.module[2], f.module[4])):
        y = film(f, k, nn.functional.linear(y if k == 0 else y.relu(), layer.weight, layer.bias))
    exact(f(x, context=c), y)


def test_film_after_the_normalisations_of_a_conv_net():
    f, x = conditioned(conv_net, where="blocks.*.bn?")
    assert f.names == ("blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2")
    y = f.module.stem(x)
    for k, block in enumerate(f.module.blocks):
        inner = film(f, 2 * k, nn.BatchNorm2d.forward(block.bn1, block.conv1(y))).relu()
        y = (y + film(f, 2 * k + 1, nn.BatchNorm2d.forward(block.bn2, block.conv2(inner)))).relu()
    exact(f(x, context=c), f.module.head(adaptive_avg_pool2d(y, 2).flatten(1)))


def test_a_correction_is_added():
    f, x = conditioned(mlp, integrator=Bilinear, where="4")
    net = f.module
    y = nn.functional.linear(net[:4](x), net[4].weight, net[4].bias)
    g = f.integrators[0]
    exact(f(x, context=c), y + g.rate * g.integrator(y, c))


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (nn.Linear, ("head",)),
        ((nn.Linear, nn.BatchNorm2d), ("blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2", "head")),
        ("stem", ("stem",)),
        ("blocks.*.conv1", ("blocks.0.conv1", "blocks.1.conv1")),
        (("stem", nn.Linear), ("stem", "head")),
        ((nn.Linear, nn.Conv1d), ("head",)),
        (lambda name, layer: name.endswith("1") and isinstance(layer, nn.Conv2d), ("blocks.0.conv1", "blocks.1.conv1")),
    ],
)
def test_where_chooses_by_type_name_or_function(where, names):
    assert condition(conv_net()[0], C, where=where).names == names


def test_the_default_is_every_linear_and_convolutional_layer():
    convs = tuple(f"blocks.{i}.conv{k}" for i in (0, 1) for k in (1, 2))
    assert condition(conv_net()[0], C).names == ("stem", *convs, "head")


@every_network
def test_one_context_for_all_and_one_input_without_a_batch(network):
    f, x = conditioned(network, where=(nn.Linear, nn.Conv3d, nn.BatchNorm2d))
    exact(f(x, context=c[0]), f(x, context=c[:1].expand(6, C)))
    if network is not conv_net:  # whose head flattens a batch
        one = condition(network()[0][0], C)
        randomise(one.integrators)
        exact(one(x[0], context=c[0]), one(x[:1], context=c[:1])[0])


def test_sequences_take_a_context_for_each_row():
    f, x = conditioned(sequences, where="linear1")
    exact(f(x, context=c.unsqueeze(1))[2], f(x[2:3], context=c[2])[0])
    with pytest.raises(MultintError, match=r"after 'linear1' \(Linear\): .* unsqueeze the shorter to \(6, 1\)"):
        f(x, context=c)


def test_a_block_that_states_its_features_can_be_chosen():
    net, x = conv_net()
    with pytest.raises(
        MultintError, match=r"how many features 'blocks.0' \(Block\) gives is not known; .*out_channels"
    ):
        condition(net, C, where=Block)
    Block.out_channels = 4
    try:
        f = condition(net, C, where=Block)
    finally:
        del Block.out_channels
    randomise(f.integrators)
    y = net.stem(x)
    for k, block in enumerate(net.blocks):
        y = film(f, k, Block.forward(block, y))
    exact(f(x, context=c), net.head(adaptive_avg_pool2d(y, 2).flatten(1)))


@every_network
def test_copies_and_stored_weights_keep_the_function(network):
    f, x = conditioned(network)
    y = f(x, context=c)
    other = copy.deepcopy(f)
    file = io.BytesIO()
    torch.save(f, file)
    file.seek(0)
    for again in (other, torch.load(file, weights_only=False)):
        torch.testing.assert_close(again(x, context=c), y, rtol=0, atol=0)
        again.integrators[-1].get_parameter("shift_bias").data.add_(1.0)
        assert not torch.allclose(again(x, context=c), y)
    torch.testing.assert_close(f(x, context=c), y, rtol=0, atol=0)
    net, _ = network()
    names = list(net.state_dict())
    fresh = condition(net, C)
    fresh.load_state_dict(f.state_dict())
    torch.testing.assert_close(fresh(x, context=c), y, rtol=0, atol=0)
    assert list(fresh.module.state_dict()) == names


def test_calls_within_calls_and_threads_keep_their_contexts():
    f, x = conditioned(mlp)
    expected = {scale: f(x, context=scale * c) for scale in (0.0, 1.0, 2.0, 3.0)}
    seen = {}

    depth = []

    def again(module, inputs, y):
        if not depth:
            depth.append(1)
            exact(f(x, context=3 * c), expected[3.0])

    handle = f.module[1].register_forward_hook(again)
    exact(f(x, context=c), expected[1.0])
    handle.remove()
    together = threading.Barrier(3)

    def wait(*_):
        together.wait(10)

    handle = f.module[1].register_forward_hook(wait)

    def call(scale):
        seen[scale] = f(x, context=scale * c)

    threads = [threading.Thread(target=call, args=(float(scale),)) for scale in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for scale in (0.0, 1.0, 2.0):
        exact(seen[scale], expected[scale])


def test_a_failed_call_leaves_no_context():
    f, x = conditioned(mlp)
    with pytest.raises(RuntimeError):
        f(x[:, :3], context=c)
    with pytest.raises(
        MultintError, match=r"'0' \(Linear\) was called without a context; call what condition returned"
    ):
        f.module(x)


def test_derivatives_of_second_order():
    f, x = conditioned(mlp, integrator=partial(LowRank, rank=2), where="2")
    f.module[1] = f.module[3] = nn.Tanh()
    inputs = x[:2].clone().requires_grad_(), c[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, c: f(x, context=c), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, c: f(x, context=c), inputs, fast_mode=True)


@pytest.mark.compiles
def test_it_is_compiled_whole():
    torch.compiler.reset()  # its limit of compilations is for all networks together
    f, x = conditioned(volumes)
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    for context in (c, 2 * c, c[0]):
        exact(compiled(x, context=context), f(x, context=context))


@pytest.mark.compiles
def test_it_is_exported_with_a_free_batch_size():
    f, x = conditioned(conv_net)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        f, (x,), {"context": c}, dynamic_shapes={"inputs": ({0: batch},), "context": {0: batch}}
    )
    exact(program.module()(x[:4], context=c[:4]), f(x[:4], context=c[:4]))


def test_checkpoints_take_the_whole_call():
    f, x = conditioned(mlp)
    weights = list(f.parameters())
    expected = torch.autograd.grad(f(x, context=c).square().sum(), weights)
    y = checkpoint(lambda x, c: f(x, context=c), x, c, use_reentrant=False)
    exact(torch.autograd.grad(y.square().sum(), weights), expected)

    class Recomputed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    y = condition(Recomputed(*mlp()[0]), C)(x.requires_grad_(), context=c)
    with pytest.raises(MultintError, match="without a context"):
        y.sum().backward()


def test_the_layout_is_kept():
    net, x = conv_net()
    f = condition(net, C)
    layouts = []
    net.stem.register_forward_hook(lambda _, __, y: layouts.append(y.is_contiguous()))
    f(x, context=c)
    assert layouts == [True]  # so that the network may view it


def test_modes_are_kept():
    net, _ = conv_net()
    net.train()
    net.blocks[0].bn1.eval()
    f = condition(net, C, partial(Hypernetwork, network=lambda z, g: nn.Sequential(nn.Linear(z, g), nn.Dropout(0.5))))
    assert f.training
    assert f.integrators.training
    assert all(part.training for part in f.integrators.modules())
    assert not net.blocks[0].bn1.training
    assert net.blocks[1].bn1.training


def test_sizes_types_and_devices_are_the_networks():
    with torch.device("meta"):
        net = ConvNet().to(torch.bfloat16)
    f = condition(net, C)
    assert {(p.dtype, p.device.type) for p in f.parameters()} == {(torch.bfloat16, "meta")}
    assert [g.x_features for g in f.integrators] == [4, 4, 4, 4, 4, 5]


def test_layers_that_are_not_called_are_told_once():
    net, x = sequences()
    f = condition(net, C)
    assert "self_attn.out_proj" in f.names  # whose weights alone are used
    with pytest.warns(UserWarning, match="chosen layers that were not called: self_attn.out_proj$"):
        f(x, context=c[0])
    f(x, context=c[0])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (nn.LSTM, r"where \(LSTM\) chooses no layer; there are 'stem' \(Conv2d\), 'blocks.0.conv1' \(Conv2d\)"),
        ("block.*.conv1", r"where \('block\.\*\.conv1'\) chooses no layer"),
        (("stem", "haed"), r"where \('haed'\) chooses no layer"),
        ("blocks.*", "how many features 'blocks.0'"),
        (lambda name, layer: False, "chooses no layer"),
        (3, "where is 3, expected a type, a name, a tuple of these, or a function"),
        (lambda layer: True, r"where \(<lambda>\) does not take a name and a layer, expected a function as in lambda"),
        (len, r"where \(len\) does not take a name and a layer"),
    ],
)
def test_a_choice_without_a_layer_lists_what_there_is(where, message):
    with pytest.raises(MultintError, match=message):
        condition(conv_net()[0], C, where=where)


def test_a_network_without_names_lists_its_parts():
    with pytest.raises(MultintError, match=r"there are the Sequential, '0' \(ReLU\)"):
        condition(nn.Sequential(nn.ReLU()), C)


def test_wrong_contexts_are_named():
    f, x = conditioned(conv_net)
    with pytest.raises(MultintError, match=r"Conditioned: context has 4 features, expected 3 \(context_features\)"):
        f(x, context=normal(6, 4))
    with pytest.raises(
        MultintError, match=r"context is missing, expected a tensor \(..., 3\), as in f\(x, context=c\)"
    ):
        f(x)
    with pytest.raises(MultintError, match=r"context is a list"):
        f(x, context=[1.0, 2.0, 3.0])
    with pytest.raises(MultintError, match=r"after 'stem' \(Conv2d\): Diagonal: .*\(6, 5, 5\) and \(5, 1, 1\) do not"):
        f(x, context=c[:5])
    with pytest.raises(MultintError, match="context_features is 0"):
        condition(conv_net()[0], 0)
    with pytest.raises(MultintError, match=r"integrator gives a Linear, expected a multint\.Integrator"):
        condition(conv_net()[0], C, lambda x, z, o: nn.Linear(x, o))


def test_what_is_no_module_is_refused():
    with pytest.raises(
        MultintError, match=r"condition: module is a builtin_function_or_method, expected a torch\.nn\."
    ):
        condition(torch.relu, C)


@pytest.mark.parametrize("network", [mlp, conv_net])
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (5, 6), (1, 1)])
def test_a_context_that_would_change_a_layers_shape_is_refused(network, shape):
    """As a recurrent layer's last state (1, B, C) would."""
    f, x = conditioned(network)
    with pytest.raises(MultintError, match=r"after '(0|stem)' .*expected one that leaves the shape as it is"):
        f(x, context=normal(*shape, C))


def test_one_input_takes_one_context_and_one_step_a_context_for_each_sequence():
    f, _ = conditioned(sequences, where="linear1")
    with pytest.raises(MultintError, match=r"the context \(6, 3\) makes \(6, 6, 16\) of the layer's \(6, 1, 16\)"):
        f(normal(6, 1, 8), context=c)
    with pytest.raises(MultintError, match=r"the context \(6, 3\) makes \(6, 8\) of the layer's \(8,\)"):
        conditioned(mlp)[0](normal(4), context=c)


def test_a_second_context_is_refused_by_name_unless_the_network_gives_the_first_itself():
    f, x = conditioned(mlp, where="2")
    for again in (f.module, f, nn.Sequential(f.module)):
        with pytest.raises(MultintError, match=r"2' \(Linear\) is conditioned already"):
            condition(again, C, where=nn.Linear)
    f(x, context=c)  # and nothing has changed

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.film = f
            self.head = nn.Linear(2, 5).double()

        def forward(self, x):
            return self.head(self.film(x, context=c))

    inner = Inner()
    expected = inner(x)
    outer = condition(inner, C, where="head")
    exact(outer(x, context=c), expected)
    randomise(outer.integrators)
    assert not torch.allclose(outer(x, context=c), outer(x, context=-c))


def test_what_is_refused_leaves_the_network_alone():
    net, x = conv_net()
    with pytest.raises(MultintError):
        condition(net, C, where=("stem", "blocks.0"))
    net(x)


def test_a_layer_that_gives_several_tensors_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    f = condition(Pair(4, 3).double(), C)
    with pytest.raises(MultintError, match="the Pair gives a tuple, expected one tensor"):
        f(normal(6, 4), context=c)
