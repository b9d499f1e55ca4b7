"""The executor by pieces: what runs in half precision, on accelerators, and where there is no C++ compiler.

Its results are no further from the truth, the loop in float64, than the loop's own are. The cells are few, as a kernel
takes seconds to compile: one stage, two stages with a piece before the second, and several states.
"""

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from multint import LSTMCell, scan
from multint.engines import kernel, program
from multint.engines.failures import RefusedError
from multint.engines.private import StandIns
from tests.both_engines import (
    DTYPES,
    agree,
    built,
    close,
    compare,
    fresh,
    inputs,
    random_state,
    replace_everywhere,
    stack,
)
from tests.both_engines import results as both_passes
from tests.catalogue import CELLS, HIDDEN_SIZE, INPUT_SIZE, normal

pytestmark = pytest.mark.compiles

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")

T, B = 12, 5


@pytest.fixture
def by_pieces(monkeypatch):
    """No loop is native."""

    def refused(*_):
        raise RefusedError("pieces are wanted")

    monkeypatch.setattr(program, "Loop", refused)


def results(cell, xs, state, engine, low):
    """Outputs, final state and all gradients by name, in float64; computed under autocast where `low` is a half."""
    with torch.autocast("cpu", low) if low.itemsize == 2 else nullcontext():
        output, final = scan(cell, xs, state, engine=engine)
    loss = (output * normal(*output.shape, seed=9).to(output)).double().sum()
    loss = loss + sum(field.double().square().sum() for field in final)
    named = {"xs": xs, **dict(zip(state._fields, state, strict=True)), **dict(cell.named_parameters())}
    named = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()))
    found = {"output": output, **{f"final {name}": field for name, field in final._asdict().items()}}
    found |= {f"gradient of {name}": gradient for name, gradient in zip(named, gradients, strict=True)}
    return {name: value.detach().double() for name, value in found.items()}


OP_BY_OP = [
    ("lstm-mi", torch.float32),
    ("gru-mi", torch.bfloat16),
    ("own-leaky", torch.bfloat16),
    ("own-leaky", torch.float16),
]
COMPILED = [("lstm-mi", torch.bfloat16)]


@pytest.mark.usefixtures("by_pieces", "poisoned")
@pytest.mark.parametrize(
    ("name", "dtype", "compiled"),
    [(*case, False) for case in OP_BY_OP] + [pytest.param(*case, True, marks=needs_a_compiler) for case in COMPILED],
    ids=str,
)
def test_the_error_is_at_most_three_times_the_loops_own(name, dtype, compiled, recwarn):
    """By the norm of each result. Where the loop makes no error at all, one rounding is allowed."""
    torch.manual_seed(0)
    cell = CELLS[name](INPUT_SIZE, HIDDEN_SIZE)
    xs = normal(T, B, INPUT_SIZE).float().requires_grad_()
    state = random_state(cell, B, torch.float32)
    # Of numbers that the dtype has: others would be rounded before the first step, which `fused` refuses.
    state = type(state)(*(field.detach().to(dtype).float().requires_grad_() for field in state))
    with nullcontext() if compiled else kernel.eager_pieces():
        ours = results(cell, xs, state, "fused", dtype)
    theirs = results(cell, xs, state, "loop", dtype)
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


@pytest.mark.usefixtures("by_pieces", "eager", "poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cell_of_half_precision(dtype):
    cell = built("lstm-mi", dtype)
    xs, state = inputs(cell, dtype=dtype)
    for actual, expected in zip(*(both_passes(cell, xs, state, engine) for engine in ("fused", "loop")), strict=True):
        assert actual.dtype == expected.dtype == dtype
        assert (actual - expected).float().norm() <= 0.05 * expected.float().norm()


@pytest.mark.usefixtures("by_pieces", "eager", "poisoned")
@pytest.mark.parametrize("name", ["lstm-mi", "gru-mi", "lstm-norm", "lstm-projected", "own-leaky"])
def test_op_by_op(name):
    cell = built(name)
    for steps, rows in ((4, 3), (1, 5), *([(1, 1)] * (name == "lstm-projected"))):
        compare(cell, steps, rows)


AROUND = {
    "nothing": nullcontext,
    "inference mode": torch.inference_mode,
    "another stance of torch.compile": lambda: torch.compiler.set_stance("fail_on_recompile"),
    "a default device": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def compiled():
    """A cell whose pieces are compiled within the first of the tests that use it."""
    return built("gru-mi", torch.float32)


@needs_a_compiler
class TestCompiled:
    """Pieces that are compiled once, for any number of steps and rows, whatever is active around their later calls."""

    @pytest.fixture(autouse=True)
    def once(self, by_pieces, monkeypatch, compiled):
        """Both passes are compiled, and no piece is from then on."""
        xs, state = inputs(compiled, 4, 3, torch.float32)
        both_passes(compiled, xs, state, "fused")
        monkeypatch.setattr(kernel.Kernel, "_compile", None)

    @pytest.mark.parametrize(("steps", "rows"), [(4, 3), (1, 1), (3, 17)])
    def test_any_number_of_steps_and_rows(self, compiled, steps, rows):
        compare(compiled, steps, rows, torch.float32)

    def test_inputs_that_are_not_contiguous(self, compiled):
        """Kernels know nothing of strides."""
        xs = normal(2, 6, 2 * INPUT_SIZE).float()[..., ::2].transpose(0, 1).requires_grad_()
        outputs = [scan(compiled, xs, compiled.initial_state(2), engine=engine)[0] for engine in ("loop", "fused")]
        close(*(torch.autograd.grad(output.sum(), xs) for output in outputs), torch.float32)

    @pytest.mark.parametrize("name", AROUND)
    def test_modes_of_the_caller(self, name, compiled):
        xs, state = inputs(compiled, 4, 3, torch.float32)
        expected, last = scan(compiled, xs, state, "loop")
        with AROUND[name](), torch.no_grad():
            actual, final = scan(compiled, xs, state, "fused")
        close([actual, *final], [expected, *last], torch.float32)

    def test_callers_in_many_threads(self, compiled):
        xs, state = inputs(compiled, 4, 3, torch.float32)
        expected = both_passes(compiled, xs, state, "loop")
        with ThreadPoolExecutor(4) as threads:
            for found in threads.map(lambda _: both_passes(compiled, xs, state, "fused"), range(8)):
                close(found, expected, torch.float32)

    def test_torch_compile_of_the_caller_and_its_reset(self, compiled):
        """Neither their limit nor their state is ours."""
        xs, state = inputs(compiled, 4, 3, torch.float32)
        expected, _ = scan(compiled, xs, state, "loop")

        @torch.compiler.disable
        def disabled():
            return scan(compiled, xs, state, "fused")[0]

        torch.compiler.reset()
        close(disabled(), expected, torch.float32)
        with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo warns of what it does itself
            call = torch.compile(lambda: scan(compiled, xs, state, "fused")[0] + 1, backend="eager")
            close(call(), expected + 1, torch.float32)


@needs_a_compiler
def test_compiled_pieces_are_accurate_near_0_too():
    world = StandIns()
    x = torch.logspace(-8, 0, 1000).float().unsqueeze(0)
    stand_in = world.rows(x)
    module = world.trace(lambda a: [a.tanh()], [stand_in])
    y = torch.empty_like(x)
    compiled = kernel.Kernel(module, world)
    compiled.build()
    compiled(x, y)
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=1e-6, atol=0)


@pytest.fixture
def kernels(monkeypatch, by_pieces):
    """The kernels that are compiled while the test runs; they are run op by op all the same."""
    made = []

    def counting(original):
        def compile(self):
            made.append(self)
            return self.eagerly

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
