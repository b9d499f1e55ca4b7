"""Laws of cells and layers, each over the whole catalogue."""

import copy
import inspect
import io
import itertools
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import models
import multint
from multint import (
    GRU,
    LSTM,
    RNN,
    Additive,
    Cell,
    GRUCell,
    LowRank,
    LSTMCell,
    MultintError,
    Recurrent,
    RNNCell,
    cells,
    integrators,
    scan,
)
from multint.cells import HiddenState, LSTMState
from multint.integrators import Normalised
from tests.catalogue import CELLS, HIDDEN_SIZE, INPUT_SIZE, LAYERS, TYPICAL, initial_state, layer, normal, randomise

T, B = 5, 3
every_cell = pytest.mark.parametrize("cell", CELLS)
typical_cell = pytest.mark.parametrize("cell", TYPICAL)
every_layer = pytest.mark.parametrize("mode", LAYERS)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def fields(state):
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def rows(state, start, stop):
    """The state of some of the sequences."""
    cut = [field[:, start:stop] for field in fields(state)]
    return cut[0] if isinstance(state, torch.Tensor) else type(state)(*cut)


def built(cell):
    return randomise(CELLS[cell](INPUT_SIZE, HIDDEN_SIZE).double())


@every_cell
def test_step_by_step_equals_the_whole_sequence(cell):
    one = built(cell)
    xs = normal(T, B, INPUT_SIZE)
    output, final = scan(one, xs, one.initial_state(B))
    state = None
    for t in range(T):
        state = one(xs[t], state)
        exact(output[t], state[0])
    exact(tuple(final), tuple(state))


@every_cell
def test_rows_do_not_know_of_each_other(cell):
    rnn = layer(cell)
    xs, state = normal(T, B, INPUT_SIZE), initial_state(layer(cell), B)
    output, final = rnn(xs, state)
    for b in range(B):
        alone, alone_final = rnn(xs[:, b : b + 1], rows(state, b, b + 1))
        exact(output[:, b : b + 1], alone)
        exact(fields(rows(final, b, b + 1)), fields(alone_final))


@every_cell
def test_split_with_carried_state_equals_the_whole(cell):
    rnn = layer(cell, "stacked")
    xs, state = normal(T, B, INPUT_SIZE), initial_state(rnn, B)
    output, final = rnn(xs, state)
    first, carried = rnn(xs[:2], state)
    second, last = rnn(xs[2:], carried)
    exact(torch.cat([first, second]), output)
    exact(fields(last), fields(final))


@typical_cell
@every_layer
def test_padded_equals_unpadded(cell, mode):
    """Outputs, final states and every gradient; what stands in the padding does not matter, not even NaN."""
    padded, alone = layer(cell, mode), layer(cell, mode)
    lengths = [5, 2, 4]
    xs = normal(T, B, INPUT_SIZE)
    for b, length in enumerate(lengths):
        xs[length:, b] = float("nan")
    others = xs.clone().requires_grad_()
    xs.requires_grad_()
    state = initial_state(padded, B)
    output, final = padded(xs, state, lengths=lengths)
    (output.square().sum() + sum(field.sum() for field in fields(final))).backward()
    for b, length in enumerate(lengths):
        one, one_final = alone(others[:length, b : b + 1], rows(state, b, b + 1))
        exact(output[:length, b : b + 1], one)
        exact(output[length:, b], torch.zeros_like(output[length:, b]))
        exact(fields(rows(final, b, b + 1)), fields(one_final))
        (one.square().sum() + sum(field.sum() for field in fields(one_final))).backward()
    exact(xs.grad, others.grad)
    for ours, theirs in zip(padded.parameters(), alone.parameters(), strict=True):
        exact(ours.grad, theirs.grad)


@typical_cell
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[5, 2, 4], [5, 4, 2]])
def test_packed_equals_lengths(cell, batch_first, lengths):
    rnn = layer(cell, "bidirectional", batch_first=batch_first)
    xs = normal(B, T, INPUT_SIZE) if batch_first else normal(T, B, INPUT_SIZE)
    state = initial_state(layer(cell, "bidirectional"), B)
    output, final = rnn(xs, state, lengths=lengths)
    for in_order in {False, lengths == sorted(lengths, reverse=True)}:
        packed = pack_padded_sequence(xs, torch.tensor(lengths), batch_first, enforce_sorted=in_order)
        packed_output, packed_final = rnn(packed, state)
        unpacked, unpacked_lengths = pad_packed_sequence(packed_output, batch_first)
        exact(unpacked, output)
        assert unpacked_lengths.tolist() == lengths
        exact(fields(packed_final), fields(final))


@pytest.mark.compiles
def test_a_sequence_of_no_steps_keeps_its_state_and_lengths_may_be_batched():
    """The same with numbers to read and without: eagerly, under vmap and in a compiled program."""
    rnn = LSTM(5, 7, bidirectional=True, engine="loop").double()
    xs, state, lengths = normal(T, B, 5), (normal(2, B, 7, seed=2), normal(2, B, 7, seed=3)), torch.tensor([4, 0, 5])
    output, final = rnn(xs, state, lengths=lengths)
    exact(output[:, 1], torch.zeros(T, 14).double())
    for field, before in zip(final, state, strict=True):
        exact(field[:, 1], before[:, 1])
    torch.compiler.reset()
    exact(torch.compile(rnn, backend="eager", fullgraph=True)(xs, state, lengths=lengths)[0], output)
    both = torch.stack([lengths, lengths.flip(0)])
    batched = torch.vmap(lambda n: rnn(xs, state, lengths=n)[0])(both)
    exact(batched, torch.stack([rnn(xs, state, lengths=n)[0] for n in both]))


REBUILT = {
    "from an iterable": lambda state: type(state)(field.detach() for field in state),
    "by pytree": lambda state: torch.utils._pytree.tree_map(torch.clone, state),
    "by collating": lambda state: [half[0] for half in torch.utils.data.default_collate([state])],
    "by deepcopy": copy.deepcopy,
    "by pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("how", REBUILT)
@pytest.mark.parametrize("mode", LAYERS)
def test_a_state_can_be_rebuilt_as_that_of_nn_lstm_can(mode, how):
    rnn = LSTM(5, 7, **LAYERS[mode]).eval()
    with torch.no_grad():
        _, state = rnn(torch.randn(T, B, 5))
        again = REBUILT[how](state)
        exact(rnn(torch.ones(T, B, 5), again)[0], rnn(torch.ones(T, B, 5), state)[0])
    assert type(state) is tuple
    assert Recurrent(5, 7, LSTMCell)(torch.randn(T, B, 5))[1]._fields == ("h", "c")


@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
def test_weights_are_drawn_anew_as_when_built(kind):
    settings = {"num_layers": 2, "bidirectional": True, "learnt_state": True, "bias": False, "integrator": LowRank}
    torch.manual_seed(0)
    fresh = kind(5, 7, **settings)
    used = pickle.loads(pickle.dumps(copy.deepcopy(randomise(kind(5, 7, **settings)))))
    torch.manual_seed(0)
    used.reset_parameters()
    torch.testing.assert_close(used.state_dict(), fresh.state_dict())
    assert len(used.all_weights) == 4
    for weight, parameter in zip(itertools.chain(*used.all_weights), used.parameters(), strict=True):
        assert weight is parameter


def test_a_factory_that_does_not_pickle_is_told_where_it_is_missed():
    rnn = LSTM(5, 7, integrator=lambda x, z, o: Additive(x, z, o))
    copy.deepcopy(rnn).reset_parameters()
    with pytest.raises(MultintError, match="LSTM: how its cells are made was lost in pickling"):
        pickle.loads(pickle.dumps(rnn)).reset_parameters()


@typical_cell
@every_layer
def test_a_reset_starts_an_episode(cell, mode):
    """Episodes in one stream equal the episodes run apart, in both directions."""
    rnn = layer(cell, mode)
    xs, state = normal(6, 1, INPUT_SIZE), initial_state(rnn, 1)
    reset = torch.tensor([[False], [False], [True], [True], [False], [False]])
    output, _ = rnn(xs, None, reset=reset)
    pieces = [rnn(piece)[0] for piece in xs.split([2, 1, 3])]
    exact(output, torch.cat(pieces))
    if mode != "bidirectional":
        carried, _ = rnn(xs, state, reset=reset)
        exact(carried[:2], rnn(xs[:2], state)[0])
        exact(carried[2:], output[2:])


@typical_cell
@every_layer
def test_batch_first_and_unbatched_are_the_same_numbers(cell, mode):
    rnn, first = layer(cell, mode), layer(cell, mode, batch_first=True)
    xs, state = normal(T, B, INPUT_SIZE), initial_state(layer(cell, mode), B)
    output, final = rnn(xs, state)
    first_output, first_final = first(xs.transpose(0, 1), state)
    exact(first_output.transpose(0, 1), output)
    exact(fields(first_final), fields(final))
    one = tuple(field[:, 1] for field in fields(state))
    one_output, one_final = rnn(xs[:, 1], one[0] if len(one) == 1 else one)
    exact(one_output, output[:, 1])
    exact(fields(one_final), tuple(field[:, 1] for field in fields(final)))


@every_cell
def test_gradients_reach_everything(cell):
    rnn = layer(cell, "stacked")
    rnn.train()
    xs = normal(T, B, INPUT_SIZE, requires_grad=True)
    state = initial_state(rnn, B)
    for field in fields(state):
        field.requires_grad_()
    output, final = rnn(xs, state)
    (output.square().sum() + sum(field.square().sum() for field in fields(final))).backward()
    missing = [name for name, p in rnn.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in (xs, *fields(state)))


@every_cell
def test_state_dict_pickle_and_deepcopy_keep_the_function(cell):
    rnn = layer(cell, "stacked")
    xs = normal(T, B, INPUT_SIZE)
    expected, _ = rnn(xs)
    other = layer(cell, "stacked")
    randomise(other, seed=9)
    other.load_state_dict(rnn.state_dict())
    exact(other(xs)[0], expected)
    exact(copy.deepcopy(rnn)(xs)[0], expected)
    stream = io.BytesIO()
    torch.save(rnn.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    exact(other(xs)[0], expected)


def test_a_layer_with_all_its_regularisation_pickles():
    noise = dict.fromkeys(("state_dropout", "weight_drop", "weight_noise", "zoneout"), 0.2)
    rnn = LSTM(5, 7, integrator=Normalised.of(Additive), **noise)
    for other in (pickle.loads(pickle.dumps(rnn)), copy.deepcopy(rnn)):
        torch.manual_seed(0)
        expected = rnn(normal(T, B, 5).float())[0]
        torch.manual_seed(0)
        exact(other(normal(T, B, 5).float())[0], expected)


REGULARISED = {
    "zoneout": {"zoneout": {"h": 0.3}},
    "input_dropout": {"input_dropout": 0.3},
    "state_dropout": {"state_dropout": 0.3},
    "weight_drop": {"weight_drop": 0.3},
    "weight_noise": {"weight_noise": 0.3},
    "dropout": {"dropout": 0.3, "num_layers": 2},
}


@pytest.mark.parametrize("name", REGULARISED)
@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
def test_regularisation_acts_in_training_alone_and_by_the_seed(kind, name):
    plain = {"num_layers": REGULARISED[name].get("num_layers", 1)}
    rnn, without = kind(5, 7, **REGULARISED[name]), kind(5, 7, **plain)
    without.load_state_dict(rnn.state_dict())
    xs = torch.randn(T, B, 5)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(rnn(xs)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.allclose(outputs[0], outputs[2])
    rnn.eval()
    if name != "zoneout":
        torch.testing.assert_close(rnn(xs)[0], without(xs)[0])


def test_zoneout_keeps_single_values_of_each_state():
    """Every new value of a state is the old one or the step's, and in evaluation their mean."""
    rnn = LSTM(5, 50, zoneout={"h": 0.2, "c": 0.6}).double()
    one = rnn.directions[0].cell
    x, h, c = normal(1, B, 5), normal(1, B, 50, seed=2), normal(1, B, 50, seed=3)
    new = one(x[0], LSTMState(h[0], c[0]))
    torch.manual_seed(0)
    _, zoned = rnn(x, (h, c))
    for value, old, stepped, probability in zip(zoned, (h, c), new, (0.2, 0.6), strict=True):
        kept = value[0] == old[0]
        exact(value[0], torch.where(kept, old[0], stepped))
        assert abs(kept.double().mean() - probability) < 0.12
    rnn.eval()
    _, mean = rnn(x, (h, c))
    exact(mean[0][0], 0.2 * h[0] + 0.8 * new.h)
    exact(mean[1][0], 0.6 * c[0] + 0.4 * new.c)


def test_locked_dropout_has_one_mask_for_all_steps():
    """On the input, for the linear map y = x; on the state, for h' = h with the dropped copy read beside it."""

    class Copy(Cell):
        def step(self, x, state):
            return HiddenState(x)

        def initial_state(self, batch_size):
            return HiddenState(torch.zeros(batch_size, 40))

    output, _ = Recurrent(40, 40, Copy, input_dropout=0.5)(torch.ones(T, B, 40))
    torch.testing.assert_close(output, output[:1].expand(T, -1, -1), rtol=0, atol=0)
    assert set(output.unique().tolist()) == {0.0, 2.0}


def test_state_dropout_drops_what_integrators_read_and_not_a_grus_memory():
    rnn = GRU(5, 40, integrator=Additive, state_dropout=0.5)
    cell = rnn.directions[0].cell
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        cell.gates.bias[40:] = 30.0  # the update gate keeps the whole of the old state
    h = torch.randn(1, B, 40)
    _, final = rnn(torch.randn(20, B, 5), h)
    torch.testing.assert_close(final, h)


def test_weight_drop_drops_recurrent_matrices_alone_and_trains_them():
    rnn = RNN(5, 7, integrator=Additive, nonlinearity=lambda a: a, weight_drop=0.5)
    torch.manual_seed(0)
    x = torch.randn(1, B, 5)
    f = rnn.directions[0].cell.integrator
    with_zero_state, _ = rnn(x)
    torch.testing.assert_close(with_zero_state, f.x_projection(x) + f.bias)
    ones = torch.eye(7).unsqueeze(0)
    output, _ = rnn(torch.zeros(1, 7, 5), ones)
    U = (output[0] - f.bias).T
    dropped = U == 0
    torch.testing.assert_close(U, torch.where(dropped, 0, 2 * f.z_projection.weight))
    assert 5 < dropped.sum() < 44
    output.sum().backward()
    torch.testing.assert_close(f.z_projection.weight.grad == 0, dropped)


def test_weight_noise_is_added_to_every_parameter_once_a_pass_with_its_gradient():
    """The outputs and the gradients are those of a layer that has the noisy weights."""
    rnn = LSTM(5, 40, num_layers=2, weight_noise=0.1, engine="loop").double()
    xs = normal(T, B, 5)
    torch.manual_seed(3)
    output, _ = rnn(xs)
    output.square().sum().backward()
    noisy = copy.deepcopy(rnn).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    noisy.zero_grad()
    expected, _ = noisy(xs)
    expected.square().sum().backward()
    exact(output, expected)
    exact([p.grad for p in rnn.parameters()], [p.grad for p in noisy.parameters()])
    added = torch.cat([(a - b).flatten() for a, b in zip(noisy.parameters(), rnn.parameters(), strict=True)])
    assert added.std().item() == pytest.approx(0.1, rel=0.05)
    assert added.abs().min() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTM(0, 7), "input_size is 0"),
        (lambda: LSTM(5, 7, num_layers=0), "num_layers is 0"),
        (lambda: LSTM(5, 7, proj_size=7), "proj_size is 7, expected 0"),
        (lambda: LSTM(5, 7, zoneout={"n": 0.1}), "zoneout names 'n', expected the state's fields: h, c"),
        (lambda: LSTM(5, 7, zoneout=1.5), "zoneout of h is 1.5"),
        (lambda: LSTM(5, 7, 2, dropout=1.1), "dropout is 1.1, expected a probability: at least 0 and at most 1"),
        (lambda: LSTM(5, 7, bias=False, integrator=lambda x, z, o: Additive(x, z, o)), "cannot be told"),
        (lambda: LSTM(5, 7, integrator=lambda x, z, o: Additive(x, z, z)), r"of the sizes \(X, Z, O\) = \(5, 7, 7\)"),
        (lambda: LSTM(5, 7, integrator=torch.nn.Bilinear), "gives a Bilinear, expected a multint.Integrator"),
        (lambda: LSTM(5, 1, memory_norm=torch.nn.LayerNorm), "LSTMCell: memory_norm is the layer normalisation of one"),
        (
            lambda: RNN(5, 7, integrator=Normalised.of(LowRank, rank=1)),
            "Normalised: norm is the layer normalisation of one",
        ),
        (lambda: Recurrent(5, 7, torch.nn.LSTMCell), "cell gives a LSTMCell, expected a multint.Cell"),
        (lambda: Recurrent(5, 7, LSTMCell(5, 7)), "expected a factory"),
        (lambda: LSTM(5, 7, weight_drop=-0.1), "weight_drop is -0.1"),
        (lambda: LSTM(5, 7, weight_noise=-0.1), "weight_noise is -0.1, expected at least 0"),
        (lambda: LSTM(5, 7, engine="warp"), "engine is 'warp', expected one of 'auto', 'fused', 'loop'"),
        (lambda: RNN(5, 7, nonlinearity="tan"), "nonlinearity is 'tan', expected 'tanh', 'relu', or a callable"),
        (lambda: RNN(5, 7, 2, 0.5), "nonlinearity is 0.5, expected 'tanh', 'relu', or a callable"),
        (lambda: RNNCell(5, 7, activation="tanh"), "activation is 'tanh', expected a function"),
        (lambda: LSTMCell(5, 7, forget_bias=True), "forget_bias is True, expected a number"),
        (lambda: LSTM(5, 7, dtype=torch.int64), "dtype is torch.int64, expected one of real or complex numbers"),
    ],
)
def test_wrong_settings_say_what_was_expected(make, message):
    with pytest.raises(MultintError, match=message):
        make()


def flags():
    """Every argument of a bool that a class of the library has."""
    for cls in itertools.chain(*(vars(package).values() for package in (multint, integrators, cells, models))):
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
            for name, parameter in inspect.signature(cls).parameters.items():
                if parameter.annotation in (bool, "bool"):
                    yield cls, name


SIZES = {
    models.AttentiveEncoder: (2, 3),
    models.LanguageModel: (9, partial(Recurrent, hidden_size=7)),
    models.RecurrentActorCritic: (5, 4, 3, Additive),
}


@pytest.mark.parametrize(("cls", "name"), sorted(set(flags()), key=str))
def test_a_flag_takes_nothing_but_a_bool(cls, name):
    """Neither a text nor a number, such as a dropout out of place: PyTorch raises a TypeError, or takes it."""
    sizes = SIZES.get(cls, (5, 7, 7) if issubclass(cls, integrators.Integrator) else (5, 7))
    for wrong in ("False", 0, 1, 0.5, None):
        with pytest.raises(TypeError, match=f"{name} is {wrong!r}, expected True or False") as caught:
            cls(*sizes, **{name: wrong})
        assert isinstance(caught.value, MultintError)


def test_every_flag_is_found_and_a_dropout_in_the_place_of_the_bias():
    found = {(cls.__name__, name) for cls, name in flags()}
    assert {("LSTM", "bias"), ("Tucker", "x_term"), ("Conditional", "residual"), ("LanguageModel", "tied")} <= found
    for make in (lambda: LSTM(3, 8, 2, 0.5), lambda: GRU(3, 8, 2, 0.5), lambda: RNN(3, 8, 2, "tanh", 0.5)):
        with pytest.raises(TypeError, match=r"bias is 0\.5, expected True or False"):
            make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rnn: rnn(torch.ones(4, 2, 6)), r"x has 6 features, expected 5 \(input_size\)"),
        (lambda rnn: rnn(torch.ones(5)), "x has 1 dimensions, expected 3, or 2"),
        (lambda rnn: rnn(torch.ones(0, 2, 5)), "x has 0 steps"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), reset=[[True]]), "reset is a list, expected a bool tensor"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), lengths=torch.tensor([True, True])), "lengths is torch.bool"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), torch.ones(1, 2, 7)), "state has 1 tensors, expected 2: h, c"),
        (
            lambda rnn: rnn(torch.ones(4, 2, 5), (torch.ones(1, 1, 7), torch.ones(1, 2, 7))),
            r"state.h has the shape \(1, 1, 7\), expected \(1, 2, 7\)",
        ),
        (lambda rnn: rnn(torch.ones(4, 2, 5), lengths=[5, 1]), "lengths are from 1 to 5, expected from 0 to 4"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), lengths=[4, -1]), "lengths are from -1 to 4"),
        (lambda rnn: rnn([[1.0]]), "x is a list, expected a tensor or a PackedSequence"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), 3), "state is a int, expected the tensors h, c"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), (None, None)), "state is a tuple of NoneType, NoneType"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), lengths=[4]), r"lengths is torch.int64 of the shape \(1,\)"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), lengths=[4.0, 2.0]), "lengths is torch.float32"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), reset=torch.ones(4, 2)), "reset is torch.float32"),
        (lambda rnn: rnn(torch.ones(4, 2, 5), reset=torch.ones(2, 4).bool()), r"torch.bool of the shape \(4, 2\)"),
        (
            lambda rnn: rnn(pack_padded_sequence(torch.ones(4, 2, 5), torch.tensor([4, 2])), lengths=[4, 2]),
            "a PackedSequence brings its own lengths",
        ),
    ],
)  # fmt: skip
def test_wrong_inputs_say_what_was_expected(call, message):
    with pytest.raises(MultintError, match=message):
        call(LSTM(5, 7))


def test_a_layer_prints_what_differs_from_the_default():
    assert LSTM(5, 7).extra_repr() == "5, 7"
    assert GRU(5, 7, 2, bidirectional=True, dropout=0.5, engine="fused").extra_repr() == (
        "5, 7, num_layers=2, bidirectional=True, dropout=0.5, engine='fused'"
    )


def test_the_explanation_of_a_layer_prints_its_directions():
    rnn = LSTM(5, 7, 2, bidirectional=True)
    with pytest.raises(MultintError, match="has not run"):
        rnn.explain()
    rnn(torch.ones(3, 2, 5))
    explained = rnn.explain()
    assert len(explained) == 4
    assert [one.engine for one in explained] == ["loop"] * 4
    assert str(explained[0].reason) in str(explained)
    names = [line for line in str(explained).splitlines() if not line.startswith(" ")]
    assert names == ["layer 0", "layer 0, backward", "layer 1", "layer 1, backward"]
    assert "object at" not in f"{explained} {explained!r}"


def test_a_layer_that_loops_by_name_says_so_at_any_time():
    rnn = LSTM(5, 7, engine="loop")
    assert str(rnn.explain()).splitlines() == ["layer 0", "  engine: loop", "  asked for"]
    rnn = LSTM(5, 7)
    rnn(torch.ones(3, 2, 5))
    rnn.engine = "loop"
    assert rnn.explain()[0].reason == "asked for"


def test_what_a_direction_does_depends_on_its_streams_alone():
    """Without a mask zoneout takes the mean, in training too, so that a trace of the step holds for both."""
    rnn = LSTM(5, 7, zoneout=0.3).double()
    direction = rnn.directions[0]
    x, state = normal(B, 5), LSTMState(normal(B, 7, seed=2), normal(B, 7, seed=3))
    new = direction.step({"x": x}, state)
    exact(new, direction.eval().step({"x": x}, state))
    exact(new.c, 0.3 * state.c + 0.7 * direction.cell.step(x, state).c)


def test_a_matrix_in_two_places_is_dropped_once():
    def twice(x, z, o):
        f = Additive(x, z, o)
        return f @ Additive(x, z, z) + f

    rnn = RNN(5, 7, integrator=twice, weight_drop=0.5)
    assert len(rnn.directions[0].dropped_weights) == 2
    rnn(torch.ones(T, B, 5))


def test_dropout_without_effect_warns():
    with pytest.warns(UserWarning, match="no effect with num_layers=1"):
        LSTM(5, 7, dropout=0.5)


def test_layer_options_that_need_an_integrator_say_so():
    class Bare(Cell):
        def step(self, x, state):
            return HiddenState(x + state.h)

        def initial_state(self, batch_size):
            return HiddenState(self.zeros(batch_size, self.hidden_size))

    with pytest.raises(MultintError, match="Bare has no integrator"):
        Recurrent(7, 7, Bare, state_dropout=0.5)
    with pytest.raises(MultintError, match="Bare has no integrator"):
        Recurrent(7, 7, Bare, weight_drop=0.5)
    with pytest.raises(MultintError, match="Bare has no parameters"):
        Recurrent(7, 7, Bare, weight_noise=0.5)
    assert Recurrent(7, 7, Bare)(torch.ones(3, 2, 7))[0].shape == (3, 2, 7)


def test_scan_says_what_is_wrong():
    cell = RNNCell(5, 7)
    with pytest.raises(MultintError, match="engine is 'warp'"):
        scan(cell, torch.ones(4, 2, 5), cell.initial_state(2), engine="warp")
    with pytest.raises(MultintError, match="lengths \\[0\\] in time"):
        scan(cell, torch.ones(0, 2, 5), cell.initial_state(2))
    with pytest.raises(MultintError, match="lengths \\[3, 4\\] in time"):
        scan(cell, {"x": torch.ones(4, 2, 5), "y": torch.ones(3, 2, 5)}, cell.initial_state(2))
    with pytest.raises(MultintError, match="state is a Tensor, expected a named tuple"):
        scan(cell, torch.ones(4, 2, 5), torch.zeros(2, 7))
    with pytest.raises(MultintError, match=r"state.h has the shape \(1, 7\), expected \(2, ...\)"):
        scan(cell, torch.ones(4, 2, 5), cell.initial_state(1))


def test_streams_that_broadcast_make_no_new_rows():
    cell, one, four = LSTMCell(5, 7), LSTMCell(5, 7).initial_state(1), LSTMCell(5, 7).initial_state(4)
    with pytest.raises(MultintError, match=r"LSTMCell: x has the shape \(5,\), expected \(B, 5\)"):
        cell(torch.ones(5))
    for x, state in ((torch.ones(4, 5), one), (torch.ones(1, 5), four), (torch.ones(4, 4, 5), four)):
        with pytest.raises(MultintError, match="expected a row of the state for each of x"):
            cell(x, state)
    for engine in ("auto", "fused", "loop"):
        with pytest.raises(MultintError, match=r"makes? .*state.h \(4, 4, 7\) of \(4, 7\)"):
            scan(cell, torch.ones(3, 4, 4, 5), four, engine)
        wide = type(four)(*(field.unsqueeze(1) for field in four))
        with pytest.raises(MultintError, match=r"state.h has the shape \(4, 1, 7\), expected \(4, 7\)"):
            scan(cell, torch.ones(3, 4, 5), wide, engine)
    with pytest.raises(MultintError, match=r"state.h has the shape \(4, 1, 7\), expected \(4, 7\)"):
        cell(torch.ones(4, 5), wide)


def test_a_cell_without_step_or_initial_state_cannot_be_built():
    class Unfinished(Cell):
        def step(self, x, state):
            return state

    with pytest.raises(TypeError, match="abstract"):
        Unfinished(5, 7)


@pytest.mark.parametrize("kind", [RNNCell, LSTMCell, GRUCell])
def test_a_cells_factory_settings_reach_it(kind):
    """A cell is configured by a partial, as it would be from a file."""
    rnn = Recurrent(5, 7, partial(kind, integrator=Normalised.of(Additive, bias=1.0)))
    assert any(isinstance(module, torch.nn.LayerNorm) for module in rnn.modules())
    assert all(p.eq(1).all() for name, p in rnn.named_parameters() if name.endswith("integrator.bias"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn(torch.ones(2, 3, 5))
