"""Streams with more axes than (T, B, X), here images: `Recurrent` of a convolutional LSTM."""

import contextlib

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from multint import MultintError, Recurrent
from multint.cells import LSTMState
from multint.errors import EngineError
from tests.both_engines import DTYPES, ConvLSTM, close
from tests.catalogue import normal, randomise

pytestmark = pytest.mark.compiles

T, B, X, H, SIDES = 4, 3, 2, 3, ConvLSTM.SIDES


def layer(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return randomise(Recurrent(X, H, ConvLSTM, **settings).to(dtype))


def images(dtype=torch.float64):
    return normal(T, B, X, *SIDES).to(dtype).requires_grad_()


@pytest.mark.parametrize(("engine", "dtype"), [("loop", torch.float64), ("auto", DTYPES["auto"])])
def test_a_stack_in_both_directions_is_its_cells_over_time(engine, dtype, worth_compiling):
    rnn, xs = layer(dtype, num_layers=2, bidirectional=True, engine=engine), images(dtype)
    first = LSTMState(*(normal(4, B, H, *SIDES, seed=s).to(dtype).requires_grad_() for s in (1, 2)))
    output, final = rnn(xs, first)
    expected, finals = xs, []
    for number in (0, 2):
        halves = []
        for i in (number, number + 1):
            cell, state = rnn.directions[i].cell, LSTMState(first.h[i], first.c[i])
            given, outputs = expected.flip(0) if i % 2 else expected, []
            for x in given:
                state = cell.step(x, state)
                outputs.append(state.h)
            halves.append(torch.stack(outputs[::-1] if i % 2 else outputs))
            finals.append(state)
        expected = torch.cat(halves, 2)  # the channels
    assert output.shape == (T, B, rnn.output_size, *SIDES) == (T, B, 2 * H, *SIDES)
    leaves, outcomes = [xs, *first, *rnn.parameters()], []
    for some, fields in ((output, final), (expected, LSTMState(*map(torch.stack, zip(*finals, strict=True))))):
        loss = some.square().sum() + sum(field.sin().sum() for field in fields)
        outcomes.append([some, *fields, *torch.autograd.grad(loss, leaves)])
    close(*outcomes, dtype)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_packing_and_resets(bidirectional):
    rnn, xs, lengths = layer(num_layers=2, bidirectional=bidirectional), images(), [2, 4, 3]
    output, final = rnn(xs, lengths=lengths)
    for row, length in enumerate(lengths):
        alone, last = rnn(xs[:length, row : row + 1])
        close(
            [output[:length, row], final.h[:, row], final.c[:, row]], [alone[:, 0], *(f[:, 0] for f in last)], xs.dtype
        )
        assert not output[length:, row].any()
    packed, last = rnn(pack_padded_sequence(xs, torch.tensor(lengths), enforce_sorted=False))
    close([pad_packed_sequence(packed)[0], *last], [output, *final], xs.dtype)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    close(rnn(xs, reset=reset)[0], torch.cat([rnn(xs[:2])[0], rnn(xs[2:])[0]]), xs.dtype)


@pytest.mark.parametrize("settings", [{}, {"learnt_state": True}], ids=str)
def test_batch_first_and_unbatched_are_the_same_numbers(settings):
    rnn, xs = layer(**settings), images()
    output, final = rnn(xs)
    for i in range(B):
        alone, last = rnn(xs[:, i])
        close([alone, *last], [output[:, i], *(field[:, i] for field in final)], xs.dtype)
        close(rnn(xs[:, i], last)[0], rnn(xs[:, i : i + 1], [f[:, i : i + 1] for f in final])[0][:, 0], xs.dtype)
    rnn.batch_first = True
    close(rnn(xs.transpose(0, 1))[0], output.transpose(0, 1), xs.dtype)


def test_regularisation():
    noise = {"zoneout": {"c": 0.5}, "input_dropout": 0.5, "dropout": 0.5}
    rnn, xs = layer(num_layers=2, bidirectional=True, **noise), images()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(rnn(xs, lengths=[4, 2, 3])[0])
    close(outputs[0], outputs[1], xs.dtype)
    assert (outputs[0] != outputs[2]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rnn: rnn(torch.ones(T, B, X)), r"3 dimensions, expected 5, or 4 where it is unbatched: \(T, X, ...\)"),
        (lambda rnn: rnn(torch.ones(T, B, X, 5, 4, 1)), "6 dimensions, expected 5"),
        (lambda rnn: rnn(torch.ones(T, B, H, 5, 4)), r"x has 3 features, expected 2 \(input_size\)"),
        (lambda rnn: rnn(torch.ones(T, X + 1, 5, 4)), "x has 3 features, expected 2"),
        (lambda rnn: rnn(pack_padded_sequence(torch.ones(T, B, X), [T] * B)), "x has 3 dimensions where it is padded"),
        (
            lambda rnn: rnn(images(), (torch.ones(1, B, H),) * 2),
            r"state.h has the shape .*, expected \(1, 3, 3, 5, 4\)",
        ),
    ],
)
def test_wrong_inputs_say_what_was_expected(call, message):
    with pytest.raises(MultintError, match=message):
        call(layer())


def test_precompile_and_explain_take_images(worth_compiling):
    """Whether the engine takes convolutions or not, it finds one step of them."""
    rnn, xs = layer(torch.float32, batch_first=True), images(torch.float32).transpose(0, 1)
    with contextlib.suppress(EngineError):
        rnn.precompile(xs)
    output, _ = rnn(xs)
    assert str(rnn.explain()).startswith("layer 0")
    rnn.engine = "loop"
    close(output, rnn(xs)[0], torch.float32)
