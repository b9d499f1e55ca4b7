"""What users run: compiled pieces in float32 and bfloat16, no further from the truth than the loop is.

The truth is the loop in float64. The cells are few, as a kernel takes seconds to compile: one stage, two stages with a
piece before the second, a product of the streams that is no vector's, and several states.
"""

import shutil

import pytest
import torch

from multint import LSTMCell, scan
from multint.engines import kernel, machine
from multint.engines.failures import RefusedError
from multint.engines.kernel import eager_pieces
from tests.both_engines import DTYPES, agree, built, compare, fresh, random_state, replace_everywhere, stack
from tests.catalogue import CELLS, HIDDEN_SIZE, INPUT_SIZE, normal

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")

T = 12
SMALL = (5, INPUT_SIZE, HIDDEN_SIZE)  # B, X, H
LARGE = (32, 64, 256)  # which oneDNN multiplies

CASES = [
    ("lstm-mi", torch.float32, LARGE),
    ("gru-mi", torch.float32, SMALL),
    ("lstm-bilinear", torch.float32, SMALL),
    ("lstm-mi", torch.bfloat16, SMALL),
    ("own-leaky", torch.bfloat16, SMALL),
    ("rnn-additive", torch.bfloat16, LARGE),
]


def results(cell, xs, state, engine, low):
    """Outputs, final state and all gradients by name, in float64; computed under autocast where `low` is bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low == torch.bfloat16):
        output, final = scan(cell, xs, state, engine=engine)
    loss = (output * normal(*output.shape, seed=9).to(output)).double().sum()
    loss = loss + sum(field.double().square().sum() for field in final)
    named = {"xs": xs, **dict(zip(state._fields, state, strict=True)), **dict(cell.named_parameters())}
    named = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()))
    found = {"output": output, **{f"final {name}": field for name, field in final._asdict().items()}}
    found |= {f"gradient of {name}": gradient for name, gradient in zip(named, gradients, strict=True)}
    return {name: value.detach().double() for name, value in found.items()}


@needs_a_compiler
@pytest.mark.parametrize(
    ("name", "dtype", "sizes"), CASES, ids=lambda value: f"H={value[2]}" if isinstance(value, tuple) else str(value)
)
def test_the_error_is_at_most_three_times_the_loops_own(name, dtype, sizes, recwarn):
    """By the norm of each result. Where the loop makes no error at all, one rounding is allowed."""
    rows, features, hidden = sizes
    torch.manual_seed(0)
    cell = CELLS[name](features, hidden)
    xs = normal(T, rows, features).float().requires_grad_()
    state = random_state(cell, rows, torch.float32)
    # Of numbers that the dtype has: others would be rounded before the first step, which `fused` refuses.
    state = type(state)(*(field.detach().to(dtype).float().requires_grad_() for field in state))
    ours, theirs = (results(cell, xs, state, engine, dtype) for engine in ("fused", "loop"))
    exact_xs = xs.detach().double().requires_grad_()
    exact_state = type(state)(*(field.detach().double().requires_grad_() for field in state))
    truth = results(cell.double(), exact_xs, exact_state, "loop", torch.float64)
    assert ours.keys() == theirs.keys() == truth.keys()
    assert [str(w.message) for w in recwarn if "multint" in str(w.message)] == [], "a piece was not compiled"
    worse = {}
    for what, exact in truth.items():
        own, error = (theirs[what] - exact).norm(), (ours[what] - exact).norm()
        if not error <= 3 * own + torch.finfo(dtype).eps * exact.norm() * (own == 0):
            worse[what] = float(error / own)
    assert worse == {}


@needs_a_compiler
@pytest.mark.parametrize("name", ["gru-mi"])
def test_compiled_pieces(name):
    cell = built(name)
    for steps, rows in ((4, 3), (1, 1), (3, 17)):
        compare(cell, steps, rows)
    # Kernels know nothing of strides: what they get must be contiguous.
    xs = normal(2, 6, 2 * INPUT_SIZE)[..., ::2].transpose(0, 1).requires_grad_()
    outputs = [scan(cell, xs, cell.initial_state(2), engine=engine)[0] for engine in ("loop", "fused")]
    gradients = [torch.autograd.grad(output.sum(), xs) for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels that are compiled while the test runs; they are run op by op all the same, and by no native loop."""
    made = []

    def refuse():
        raise RefusedError("a test of the pieces")

    monkeypatch.setattr(machine, "compiler", refuse)

    def counting(original):
        def compile(self):
            made.append(self)

            def run(arguments):
                with eager_pieces():
                    self(arguments)

            return run

        return compile

    replace_everywhere(monkeypatch, kernel.__name__, "Kernel._compile", counting)
    return made


@pytest.mark.usefixtures("worth_compiling")
@pytest.mark.parametrize("engine", ["fused", "auto"])
def test_training_and_evaluation_share_one_compiled_program(engine, kernels):
    """Where nothing differs: without dropout and zoneout. Equal layers share it too."""
    rnn = stack(fresh(LSTMCell), engine).train()
    xs = normal(4, 3, 2 * HIDDEN_SIZE).to(DTYPES[engine]).requires_grad_()
    agree(rnn, xs)
    count = len(kernels)
    assert count in (1, 2), "one piece, and its derivative"
    agree(rnn.eval(), xs)
    assert len(kernels) == count
