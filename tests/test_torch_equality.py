"""With Additive integrators and copied weights our layers are nn.RNN, nn.LSTM and nn.GRU, in every mode they have."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from multint import GRU, LSTM, RNN, MultintError, from_torch
from tests.catalogue import normal

T, B, X, H = 6, 4, 5, 7

MODULES = {
    "rnn-tanh": (nn.RNN, {}),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "lstm-projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
}
SHAPES = [
    {"num_layers": layers, "bidirectional": both, "bias": bias}
    for layers, both, bias in itertools.product((1, 3), (False, True), (True, False))
]
every_module = pytest.mark.parametrize("name", MODULES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))


def pair(name, **settings):
    kind, own = MODULES[name]
    torch.manual_seed(0)
    theirs = kind(X, H, **own, **settings).double()
    return theirs, from_torch(theirs)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def flat(state):
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def random_state(module, *batch):
    directions = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H] + [H] * isinstance(module, nn.LSTM)
    state = [normal(directions, *batch, n, seed=3 + i, requires_grad=True) for i, n in enumerate(widths)]
    return state[0] if len(state) == 1 else tuple(state)


def run(module, x, state):
    """Outputs, final state, and the gradients of the input and the initial state; parameters keep theirs."""
    output, final = module(x, state)
    values = output.data if isinstance(output, PackedSequence) else output
    loss = (values * normal(*values.shape, seed=9)).sum()
    loss = loss + sum((field * normal(*field.shape, seed=10)).sum() for field in flat(final))
    leaves = [x.data if isinstance(x, PackedSequence) else x, *(flat(state) if state is not None else ())]
    grads = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], retain_graph=True)
    module.zero_grad()
    loss.backward(inputs=list(module.parameters()))
    return values, flat(final), grads


def check_parameters(theirs, ours):
    """Every gradient of theirs against the one of ours that stands for it."""
    for index, direction in enumerate(ours.directions):
        layer, backward = divmod(index, 2) if ours.bidirectional else (index, 0)
        suffix = f"_l{layer}{'_reverse' if backward else ''}"
        W, U = getattr(theirs, f"weight_ih{suffix}").grad, getattr(theirs, f"weight_hh{suffix}").grad
        cell = direction.cell
        maps = (
            [cell.gates, cell.candidate] if isinstance(ours, GRU) else [getattr(cell, "gates", None) or cell.integrator]
        )
        exact(torch.cat([f.x_projection.weight.grad for f in maps]), W)
        exact(torch.cat([f.z_projection.weight.grad for f in maps]), U)
        if isinstance(theirs, nn.LSTM) and theirs.proj_size:
            exact(cell.projection.weight.grad, getattr(theirs, f"weight_hr{suffix}").grad)
        if theirs.bias:
            exact(torch.cat([f.bias.grad for f in maps]), getattr(theirs, f"bias_ih{suffix}").grad)
            b_h = getattr(theirs, f"bias_hh{suffix}").grad
            exact(torch.cat([maps[0].bias.grad, *([cell.recurrent_bias.grad] if isinstance(ours, GRU) else [])]), b_h)


@every_module
@every_shape
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given_state", [False, True])
def test_padded_batches(name, shape, batch_first, given_state):
    theirs, ours = pair(name, batch_first=batch_first, **shape)
    x = normal(B, T, X, requires_grad=True) if batch_first else normal(T, B, X, requires_grad=True)
    state = random_state(theirs, B) if given_state else None
    for actual, expected in zip(run(ours, x, state), run(theirs, x, state), strict=True):
        exact(actual, expected)
    check_parameters(theirs, ours)


@every_module
@every_shape
@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [2, 6, 1, 5]], ids=["sorted", "unsorted"])
def test_packed_batches(name, shape, lengths):
    theirs, ours = pair(name, **shape)
    x = normal(T, B, X, requires_grad=True)
    in_order = lengths == sorted(lengths, reverse=True)
    state = random_state(theirs, B)
    results = []
    for module in (ours, theirs):
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=in_order)
        output, _ = module(packed, state)
        assert (output.sorted_indices is None) == in_order
        torch.testing.assert_close(output.batch_sizes, packed.batch_sizes)
        results.append(run(module, packed, state))
    for actual, expected in zip(*results, strict=True):
        exact(actual, expected)
    check_parameters(theirs, ours)


@every_module
def test_unbatched(name):
    theirs, ours = pair(name, num_layers=2, bidirectional=True)
    x = normal(T, X, requires_grad=True)
    state = random_state(theirs)
    for actual, expected in zip(run(ours, x, state), run(theirs, x, state), strict=True):
        exact(actual, expected)


def test_dropout_between_layers_is_theirs():
    """The same generator gives the same masks, for the draws are the same in shape and order."""
    theirs, ours = pair("gru", num_layers=3, dropout=0.4)
    x = normal(T, B, X)
    outputs = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(module(x)[0])
    exact(*outputs)


@pytest.mark.parametrize(("theirs", "kind"), [(nn.RNN, RNN), (nn.LSTM, LSTM), (nn.GRU, GRU)])
def test_settings_carry_over(theirs, kind):
    settings = {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.3, "bidirectional": True}
    module = theirs(X, H, **settings).eval()
    ours = from_torch(module)
    assert isinstance(ours, kind)
    assert not ours.training
    for name in ("input_size", "hidden_size", *settings):
        assert getattr(ours, name) == getattr(module, name)
    assert next(ours.parameters()).dtype == torch.float32


def test_the_arguments_stand_where_pytorch_has_them():
    for theirs, ours in ((nn.LSTM, LSTM), (nn.GRU, GRU)):
        a, b = theirs(X, H, 2, True, True, 0.0, True), ours(X, H, 2, True, True, 0.0, True)
        x = torch.randn(B, T, X)
        assert a(x)[0].shape == b(x)[0].shape
        b.flatten_parameters()
    assert LSTM(X, H, device="cpu", dtype=torch.float64)(normal(T, B, X))[0].dtype == torch.float64


@every_module
def test_an_empty_batch_and_the_state_by_its_name(name):
    theirs, ours = pair(name)
    x, state = normal(T, 0, X), random_state(theirs, 0)
    for actual, expected in zip(ours(x, hx=state), theirs(x, hx=state), strict=True):
        assert [a.shape for a in flat(actual)] == [e.shape for e in flat(expected)]


def test_the_mode_is_theirs():
    for name in MODULES:
        theirs, ours = pair(name)
        assert ours.mode == theirs.mode


SETTINGS = [
    {"bias": "False"}, {"bias": 0}, {"bias": 1}, {"bias": None}, {"batch_first": "False"}, {"batch_first": 1},
    {"input_size": 0}, {"input_size": 3.0}, {"input_size": "3"}, {"hidden_size": -1}, {"hidden_size": 8.0},
    {"num_layers": 0}, {"num_layers": 1.5}, {"num_layers": "2"}, {"dropout": 1.5}, {"dropout": -0.1},
    {"dropout": True}, {"dropout": "a"}, {"dropout": None}, {"dropout": float("nan")}, {"dtype": torch.int64},
    {"device": "nowhere"}, {"unknown": 1}, {"proj_size": H}, {"proj_size": -1}, {"proj_size": 2.5},
    {"proj_size": True}, {"nonlinearity": "tan"},
]  # fmt: skip
x, h = torch.ones(T, B, X), torch.zeros(1, B, H)
INPUTS = {
    "features": (torch.ones(T, B, X + 1),),
    "one dimension": (torch.ones(X),),
    "four dimensions": (torch.ones(1, T, B, X),),
    "no steps": (torch.ones(0, B, X),),
    "float64": (x.double(),),
    "float16": (x.half(),),
    "integers": (x.long(),),
    "bools": (x.bool(),),
    "complex numbers": (x.to(torch.complex64),),
    "packed float64": (pack_padded_sequence(x.double(), torch.tensor([T] * B)),),
    "a state in float64": (x, h.double()),
    "a state of integers": (x, h.long()),
    "a state's rows": (x, torch.zeros(1, B + 1, H)),
    "a state that broadcasts": (x, torch.zeros(1, 1, H)),
    "a state's features": (x, torch.zeros(1, B, H + 1)),
    "a state's layers": (x, torch.zeros(2, B, H)),
    "a state without layers": (x, torch.zeros(B, H)),
    "a batched state of one sequence": (x[:, 0], h),
}


def raised(function, *arguments, **settings):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*arguments, **settings)
    return caught.value


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_what_they_raise_for_a_setting_catches_ours(settings):
    for theirs, ours in ((nn.RNN, RNN), (nn.LSTM, LSTM), (nn.GRU, GRU)):
        own = {"proj_size": nn.LSTM, "nonlinearity": nn.RNN}.get(next(iter(settings)), theirs)
        if own is theirs:
            given = {"input_size": X, "hidden_size": H, "num_layers": 2} | settings
            assert isinstance(raised(ours, **given), type(raised(theirs, **given)))


@pytest.mark.parametrize("case", INPUTS)
def test_what_they_raise_for_an_input_catches_ours(case):
    """An integer, or another dtype, in words that name both."""
    for theirs, ours in ((nn.RNN, RNN), (nn.LSTM, LSTM), (nn.GRU, GRU)):
        given, *state = INPUTS[case]
        state = [(state[0], state[0]) if theirs is nn.LSTM else state[0]] if state else []
        error = raised(ours(X, H), given, *state)
        assert isinstance(error, type(raised(theirs(X, H), given, *state)))
        assert isinstance(error, MultintError)
        dtype = (state[0][0] if theirs is nn.LSTM else state[0]).dtype if state else getattr(given, "data", given).dtype
        if dtype != torch.float32:
            assert f"is {dtype}, expected torch.float32, as the weights are: convert it by .to(torch" in str(error)


def test_a_memory_of_another_dtype_is_refused_and_autocasts_own_states_are_not():
    rnn = LSTM(X, H)
    with pytest.raises(RuntimeError, match=r"LSTM: state.c is torch.float64, expected torch.float32"):
        rnn(x, (h, h.double()))
    with torch.autocast("cpu", torch.bfloat16):
        _, state = rnn(x)
        assert state[0].dtype == torch.bfloat16
        rnn(x.bfloat16(), state)
        with pytest.raises(MultintError, match=r"x is torch.int64, .*convert it by .to\(torch.float32\)$"):
            rnn(x.long())


def test_other_modules_are_refused():
    with pytest.raises(MultintError, match="got Linear, expected"):
        from_torch(nn.Linear(2, 3))
    with pytest.raises(MultintError, match="got ReLU, expected"):
        from_torch(nn.ReLU())
