"""The native loop: it gives what the loop gives, near 0 too; what it refuses or fails at is run from Python instead."""

import contextlib
import ctypes
import functools
import math
import os
import shutil
import stat
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from multint import LSTM, LSTMCell, RNNCell, explain, scan
from multint.cells import HiddenState
from multint.engines import kernel, precompile, tables
from multint.engines.failures import RefusedError
from multint.engines.native import loop as native
from multint.engines.native import machine
from multint.engines.native.loop import Loop
from multint.engines.program import program_of
from multint.errors import OptionError
from tests.both_engines import (
    TOLERANCES,
    ConvLSTM,
    Free,
    bfloat16_by_default,
    built,
    close,
    compare,
    inputs,
    is_whole,
    random_state,
    results,
)
from tests.catalogue import CELLS, HIDDEN_SIZE, INPUT_SIZE, TYPICAL, normal, randomise

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(shutil.which("g++") is None, reason="a native loop needs a C++ compiler"),
]

# One stage; a piece before a stage; norms, which sum within a row and over the rows; a stage's left side that is a
# product in each row.
NAMES = ("lstm-mi", "gru-mi", "lstm-norm", "lstm-bilinear")


def loops(cell):
    """The native loops of a cell's last scan with gradients, forward and reverse, or why there are none."""
    program = tables.record_of(cell).last.program()
    made = [program.executors[id(program.last), reverse] for reverse in (False, True)]
    return [reason or executor for executor, reason in made]


def own(name):
    """A catalogued cell of a size that no other test has: its loops are compiled here, as users get them."""
    torch.manual_seed(0)
    return randomise(CELLS[name](INPUT_SIZE, 17)).float()


def near(actual, expected):
    """Equal up to rounding, by the largest number of each: gradients of some cells come to a hundred."""
    for ours, theirs in zip(actual, expected, strict=True):
        bound = TOLERANCES[theirs.dtype] * max(1.0, theirs.detach().abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


class Together:
    """Loops that are compiled as one library, since a compiler takes a second to begin: each has a function there."""

    def __init__(self, cells, dtype):
        self.alone, self.dtype, texts = machine.library, dtype, {}
        self.programs = []  # kept alive
        for cell in cells:
            xs, state = inputs(cell, dtype=dtype)
            self.programs.append(program_of(cell, xs[0], state, by_name=True)[0])
            for reverse in (False, True):
                with contextlib.suppress(RefusedError):
                    text = Loop(self.programs[-1].whole(), reverse)._text
                    texts.setdefault(text, len(texts))
        parts = (text.replace("void run(", f"void run{i}(") for text, i in texts.items())
        self.texts = texts
        source = "".join(f"namespace of{i} {{\n{part}\n}}\n" for i, part in enumerate(parts))
        self.whole = machine.library(source, dtype)

    def library(self, text, dtype=torch.float32):
        """What a library of the text alone would have."""
        if text not in self.texts or dtype != self.dtype:
            return self.alone(text, dtype)
        run = getattr(self.whole, f"run{self.texts[text]}")
        return SimpleNamespace(run=run, pack=self.whole.pack, panel_columns=self.whole.panel_columns)


@contextlib.contextmanager
def together(cells, dtype=torch.float32):
    """What is compiled for the cells within it is one library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "library", Together(cells, dtype).library)
        yield


# The code is the same for both but for its type, of which float64 shows the smallest mistake.
CATALOGUED = {torch.float64: CELLS, torch.float32: TYPICAL}


@pytest.fixture(scope="module")
def catalogued():
    """The catalogued cells of a dtype, which are built and compiled at its first test."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def cells(dtype):
            made = {name: built(name, dtype) for name in CATALOGUED[dtype]}
            stack.enter_context(together(made.values(), dtype))
            return made

        yield cells


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for dtype, names in CATALOGUED.items() for name in names], ids=str
)
def test_every_catalogued_cell_gives_what_the_loop_gives(name, dtype, catalogued, monkeypatch):
    """All outputs and gradients, by one thread and by two. The state before the first step stays as it was.

    Whatever the schedule is that was run, it is whole.
    """
    cell, one_row = catalogued(dtype)[name], name in TYPICAL and dtype == torch.float64  # which is traced apart
    for steps, rows, threads in ((4, 3, 1), (3, 17, 2), *([(1, 1, 1)] * one_row)):
        xs, state = inputs(cell, steps, rows, dtype)
        before = [field.clone() for field in state]
        expected = results(cell, xs, state, "loop")
        with monkeypatch.context() as patch:  # torch's own setting would have the step traced once more
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            near(results(cell, xs, state, "fused"), expected)
        torch.testing.assert_close([*state], before, rtol=0, atol=0)
    assert all(isinstance(loop, Loop) for loop in loops(cell))
    assert str(explain(cell)).count("by native code") == 2
    is_whole(tables.record_of(cell).last.program().whole(), cell)
    if name in TYPICAL:
        first, second = (results(cell, xs, state, "fused") for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def padded(h, size):
    return F.pad(h, (0, size - HIDDEN_SIZE))


def attention(q):
    return (q @ q.mT).softmax(-1) @ q


def image(h):
    return padded(h, 18).view(-1, 2, 3, 3)


# What a step may do within each row, beyond the operations on numbers: the cell's p has the shape behind the step, and
# y is of the step's width, or of the width 1.
WITHIN_ROWS = {
    "three-by-einsum": (lambda p, x, h: torch.einsum("bi,ijo,bj->bo", x, p, h), INPUT_SIZE, 7, 7),
    "matrix-by-einsum": (lambda p, x, h: torch.einsum("bi,oi->bo", h, p), 7, 7),
    "matrix-twice-by-einsum": (lambda p, x, h: torch.einsum("bi,ik,ok->bo", h, p, p), 7, 3),
    "heads-by-einsum": (
        lambda p, x, h: torch.einsum("bki,kio->bko", padded(h, 8).view(-1, 2, 4), p).flatten(1).mean(1, True),
        *(2, 4, 4),
    ),
    "many-heads-by-einsum": (
        lambda p, x, h: torch.einsum("bki,kio->bko", padded(h, 20).view(-1, 20, 1), p).sum(1).mean(1, True),
        *(20, 1, 2),
    ),
    "heads-by-bmm": (
        lambda p, x, h: torch.bmm(padded(h, 8).view(-1, 2, 4).transpose(0, 1), p).sum((0, 2)).unsqueeze(-1),
        *(2, 4, 4),
    ),
    "heads-by-matmul": (lambda p, x, h: (padded(h, 8).view(-1, 2, 1, 4) @ p).sum((1, 2, 3)).unsqueeze(-1), 2, 4, 4),
    "matrices-of-the-input": (
        lambda p, x, h: ((x @ p).view(-1, 2, 3, 3) @ h[:, :6].reshape(-1, 2, 3, 1)).flatten(1).mean(1, True),
        *(INPUT_SIZE, 18),
    ),
    "bilinear": (lambda p, x, h: F.bilinear(x, h, p), 7, INPUT_SIZE, 7),
    "matrix-on-the-left": (lambda p, x, h: (p @ h.t()).t(), 7, 7),
    "vector": (lambda p, x, h: (h @ p).unsqueeze(-1), 7),
    "number": (lambda p, x, h: p * h + p.sigmoid()),
    "reflection": (lambda p, x, h: h - 2 * (h * p).sum(-1, keepdim=True) * p / p.norm() ** 2, 7),
    "norm-of-one-vector-twice": (lambda p, x, h: F.layer_norm(h, (7,), p, p), 7),
    "sets": (lambda p, x, h: F.linear(padded(h, 12).view(-1, 3, 4), p, p[:, 0]).sum((1, 2)).unsqueeze(-1), 5, 4),
    "flat-sets": (lambda p, x, h: (padded(h, 12).view(-1, 4) @ p).view(-1, 15).sum(1, True), 4, 5),
    "flat-numbers": (lambda p, x, h: h.reshape(-1, 1).tanh().reshape(h.shape) + h.reshape(-1, 1).sum(1).view(-1, 7)),
    "attention-of-heads": (
        lambda p, x, h: (
            attention(padded(h, 12).view(-1, 2, 3, 2)).flatten(1)[:, :7]
            + F.scaled_dot_product_attention(*[padded(h, 12).view(-1, 2, 3, 2)] * 3).flatten(1)[:, :7]
        )
    ),
    "conv1d": (lambda p, x, h: F.conv1d(h.unsqueeze(1), p, padding=1).mean(1), 2, 1, 3),
    "conv1d-with-steps": (lambda p, x, h: F.conv1d(h.unsqueeze(1), p, stride=2).flatten(1).mean(1, True), 2, 1, 3),
    "conv2d": (
        lambda p, x, h: F.conv2d(image(h), p, p[:, 0, 0, 0], padding=1).mean((1, 2, 3)).unsqueeze(1),
        3,
        2,
        3,
        3,
    ),
    "conv2d-with-steps": (
        lambda p, x, h: F.conv2d(image(h), p, padding=1, stride=2).sum((1, 2, 3)).unsqueeze(1),
        *(3, 2, 3, 3),
    ),
    "conv2d-of-groups": (
        lambda p, x, h: F.conv2d(image(h), p, padding=1, groups=2, dilation=2).sum((1, 2, 3)).unsqueeze(1),
        *(6, 1, 2, 2),
    ),
    "running": (lambda p, x, h: h.cumsum(-1) + h.view(-1, 7, 1).cumsum(1).squeeze(-1) + h.cumprod(-1)),
    "reductions": (
        lambda p, x, h: (
            h.amax(-1, True) * h.amin(-1, True)
            + h.prod(-1, True)
            + h.std(-1, keepdim=True)
            + h.view(-1, 7, 1).sum((1, 2)).unsqueeze(-1)
            + h.norm(dim=-1, keepdim=True)
            + h.norm(1, -1, True)
            + h.norm(torch.inf, -1, True)
        )
    ),
    "places": (lambda p, x, h: h.roll(2, -1) + h.flip(-1) + h.repeat(1, 2)[:, 3:10] + F.pad(h[:, :-1], (1, 0))),
    "every-second-in-place": (lambda p, x, h: h.slice_scatter(x[:, :3], 1, 1, None, 2) + h[:, ::2].repeat(1, 2)[:, :7]),
    "written-through-a-transposed-view": (
        lambda p, x, h: (v := h.unsqueeze(1) + h.unsqueeze(2), v.mT[:, 0].mul_(2), v.view(-1, 49))[2][:, 3:10]
    ),
    "choice-that-spreads": lambda p, x, h: h + torch.where(h > 0, v := h[:, :1], v).sum(1, True),
    "batch-in-the-middle": (
        lambda p, x, h: torch.stack([h, h.sin(), h * p], 0).transpose(0, 1).reshape(-1, 21)[:, ::3],
        7,
    ),
    "windows": (
        lambda p, x, h: h.unfold(1, 3, 2).square().sum(-1).mean(-1, True) + F.avg_pool1d(h.unsqueeze(1), 2).mean(2)
    ),
    "matrices": (
        lambda p, x, h: (
            (h.unsqueeze(1) * h.unsqueeze(2)).tril().sum(1)
            + (h.unsqueeze(1) * x[:, :1, None]).expand(-1, 7, -1).diagonal(dim1=1, dim2=2)
        )
    ),
    "groups": (lambda p, x, h: F.group_norm(padded(h, 8), 2)[:, :7]),
}


@pytest.fixture(scope="module")
def within_rows():
    def cell(line, *shape):
        made = Free(lambda cell, x, h: (x @ cell.W + h @ cell.U + 0.3 * line(cell.p, x, h)).tanh()).float()
        made.p = nn.Parameter(normal(*shape).float() / 2)
        return made

    steps = {k: v if isinstance(v, tuple) else (v,) for k, v in WITHIN_ROWS.items()}
    cells = {name: cell(*step) for name, step in steps.items()}
    with together(cells.values()):
        yield cells


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", WITHIN_ROWS)
def test_what_a_step_does_within_each_row(name, within_rows):
    cell = within_rows[name]
    xs, state = inputs(cell, dtype=torch.float32)
    near(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"))
    assert all(isinstance(loop, Loop) for loop in loops(cell))


def test_convolutions_are_each_rows_own():
    """Natively and by pieces."""
    torch.manual_seed(0)
    cell = ConvLSTM(2, 3)
    xs, state = normal(3, 4, 2, *cell.SIDES).float().requires_grad_(), random_state(cell, 4, torch.float32)
    expected = results(cell, xs, state, "loop")
    close(results(cell, xs, state, "fused"), expected, torch.float32)
    assert all(isinstance(loop, Loop) for loop in loops(cell))
    with kernel.eager_pieces():
        close(results(cell, xs, state, "fused"), expected, torch.float32)


def test_a_constant_that_torch_rounds_to_float32_in_float64():
    """A sixth, in the derivative of hardsigmoid."""
    cell = Free(lambda cell, x, h: F.hardsigmoid(x @ cell.W + h @ cell.U)).double()
    compare(cell, 3, 4)
    assert all(isinstance(loop, Loop) for loop in loops(cell))


@pytest.mark.parametrize("place", ["stream", "state", "weight", "bias", "gradient"])
def test_numbers_whose_sign_is_a_mark(place):
    """An imaginary part of a conjugate has its sign in a mark, which memory does not show."""

    def negated(tensor):
        marked = torch._neg_view(-tensor)
        assert marked.is_neg()
        return marked

    cell = Free(lambda cell, x, h: (x @ cell.V + h @ cell.U + cell.b).tanh()).float()
    cell.V, cell.b = (negated(v) if name == place else v for name, v in (("weight", cell.W), ("bias", cell.a)))
    xs, state = inputs(cell, dtype=torch.float32)
    outcomes = []
    for engine in ("loop", "fused"):
        h = negated(state.h) if place == "state" else state.h
        output, final = scan(cell, negated(xs) if place == "stream" else xs, HiddenState(h), engine)
        given = [normal(*r.shape).float() for r in (output, final.h)]
        given = [negated(g) for g in given] if place == "gradient" else given
        leaves = [xs, state.h, cell.W, cell.U, cell.a]
        outcomes.append([output, *final, *torch.autograd.grad([output, final.h], leaves, given)])
    close(*outcomes, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_it_may_go_by_blocks_of_steps(name, monkeypatch):
    """The first of which is shorter. What stands before and after a block is added up."""
    cell = built(name, torch.float32)
    xs, state = inputs(cell, 7, 3, torch.float32)
    expected = results(cell, xs, state, "loop")
    close(results(cell, xs, state, "fused"), expected, torch.float32)
    with torch.no_grad():
        scan(cell, xs, state, "fused")
    monkeypatch.setattr(native, "_LEAST_ROWS", 6)
    monkeypatch.setattr(native, "_CACHED", 0)
    assert all(loop.blocks(7, 3) == [range(2), range(2, 4), range(4, 7)] for loop in loops(cell))
    close(results(cell, xs, state, "fused"), expected, torch.float32)
    with torch.no_grad():
        output, final = scan(cell, xs, state, "fused")
    close([output, *final], expected[: 1 + len(final)], torch.float32)


def test_memory_is_taken_again_and_nothing_that_was_given_lies_in_it():
    """Whether by one thread or by several at once."""
    cell = built("lstm-mi", torch.float32)

    def run(seed):
        xs, state = inputs(cell, 6, 3, torch.float32)
        xs = (xs.detach() + seed).requires_grad_()
        expected = results(cell, xs, state, "loop")
        given = [results(cell, xs, state, "fused")]
        with torch.no_grad():
            output, final = scan(cell, xs, state, "fused")
        given.append([output, *final])
        return given, expected

    run(0)
    assert any(loop._released for loop in loops(cell))
    with ThreadPoolExecutor(3) as threads:
        runs = [run(1), *threads.map(run, range(2, 8))]
    for given, expected in runs:  # after all of them have run
        for found in given:
            close(found, expected[: len(found)], torch.float32)


def test_its_memory_outlives_inference_mode():
    cell = built("lstm-mi", torch.float32)
    xs, state = inputs(cell, 6, 3, torch.float32)
    expected = results(cell, xs, state, "loop")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            close(scan(cell, xs, state, "fused")[0], expected[0], torch.float32)
    close(results(cell, xs, state, "fused"), expected, torch.float32)


def test_explain_shows_the_loops_that_ran():
    """Those of the last training pass, where the input wants no gradient too."""
    cell = LSTMCell(5, 9)
    told = precompile(cell, normal(6, 3, 5).float())
    assert "once that is compiled" not in str(told)
    assert str(told).count("by native code") == 2
    scan(cell, normal(6, 3, 5).float().requires_grad_(), cell.initial_state(3), "fused")[0].sum().backward()
    assert "d_x[:]" in str(explain(cell))
    assert "once that is compiled" not in str(explain(cell))


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_may_share_a_products_columns(threads, monkeypatch):
    """As they do where the matrix is large; some may have no row, or no column."""
    monkeypatch.setattr(native, "_BY_COLUMNS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cell = own("gru-mi")
    for rows in (1, 5, 40):
        xs, state = inputs(cell, 4, rows, torch.float32)
        close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float32)


# By the library's names and torch's.
FUNCTIONS = {"hyperbolic_tangent": torch.tanh, "logistic": torch.sigmoid, "exponential": torch.exp}


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_functions_are_accurate_in_relative_terms_near_0_too(dtype):
    """Within 3 units in the last place; those of float32 by torch's in float64, which are no further off themselves."""
    largest = torch.finfo(dtype).max
    numbers = torch.cat([torch.logspace(-30, 3, 20000), torch.linspace(0, 20, 20001), torch.linspace(0, 720, 20001)])
    numbers = torch.cat([numbers, -numbers]).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    code = "".join(
        f'extern "C" void all_{name}(const real *from, real *to, int64_t n) {{\n#pragma omp simd\n'
        f"for (int64_t i = 0; i < n; ++i) to[i] = {name}(from[i]); }}\n"
        for name in FUNCTIONS
    )
    library = machine.library(code, dtype)

    def of(name, x):
        y = torch.empty_like(x)
        getattr(library, f"all_{name}")(*map(ctypes.c_int64, (x.data_ptr(), y.data_ptr(), len(x))))
        return y

    units = 3 * torch.finfo(dtype).eps
    for name, exact in FUNCTIONS.items():
        expected = exact(numbers.double())
        normal_ones = (expected.abs() > torch.finfo(dtype).tiny) & (expected.abs() < largest)
        actual = of(name, numbers).double()
        torch.testing.assert_close(actual[normal_ones], expected[normal_ones], rtol=units, atol=0)
        torch.testing.assert_close(of(name, special), exact(special), rtol=0, atol=0, equal_nan=True)
    # The derivative of tanh is computed of its value, which must not be 1 before it has to.
    exact = 1 - numbers.double().tanh().square()
    actual = 1 - of("hyperbolic_tangent", numbers).square().double()
    torch.testing.assert_close(actual, exact, rtol=0, atol=2 * torch.finfo(dtype).eps)
    # Where sigmoid is no normal number, and silu multiplies it.
    edge = -math.log(largest)
    far = torch.tensor([edge + 0.2, edge - 11, edge - 31, -largest], dtype=dtype)
    torch.testing.assert_close(of("logistic", far), far.sigmoid(), rtol=0, atol=torch.finfo(dtype).tiny * 1e-5)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_small_activations_have_accurate_gradients(size):
    """Relative to the norm of each result; the loop's own error is about 1e-7."""
    cell = own("rnn-mi")
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(size**0.5)
    xs, state = inputs(cell, dtype=torch.float32)
    xs, state = xs.detach().mul(size).requires_grad_(), HiddenState(state.h.detach().mul(size).requires_grad_())
    ours = results(cell, xs, state, "fused")
    exact_state = HiddenState(state.h.detach().double().requires_grad_())
    exact = results(cell.double(), xs.detach().double().requires_grad_(), exact_state, "loop")
    for actual, expected in zip(ours, exact, strict=True):
        assert (actual.double() - expected).detach().norm() <= 1e-6 * expected.detach().norm()


def no_compiler():
    raise RefusedError("there is no C++ compiler")


@pytest.mark.usefixtures("no_inductor")
def test_what_it_refuses_runs_from_python_and_is_told():
    cell = Free(lambda cell, x, h: x @ cell.W + (h @ cell.U).double().tanh().float()).float()
    xs, state = inputs(cell, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float32)
    assert loops(cell) == ["it computes in float32 and float64"] * 2
    assert str(explain(cell)).count("by Python, step by step: ") == 2
    assert str(explain(cell, xs, engine="fused")) == str(explain(cell))


@pytest.mark.usefixtures("no_inductor")
def test_only_one_of_its_loops_may_be_native():
    """The gradient of a largest number goes by its place, of whole numbers. Slices may reach beyond what there is."""

    def step(cell, x, h):
        y = (x @ cell.W + h @ cell.U).tanh() + h[:, -100:] + torch.nn.functional.silu(h)[:, 1:2]
        return y / (1 + y.abs().max(1, keepdim=True).values)

    cell = Free(step).float()
    xs, state = inputs(cell, dtype=torch.float32)
    close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float32)
    forward, reverse = loops(cell)
    assert isinstance(forward, Loop)
    assert "float32 and int64" in reverse


def test_defaults_of_the_process_are_not_its_own():
    cell = RNNCell(INPUT_SIZE, 15)
    xs, state = inputs(cell, dtype=torch.float32)
    expected = results(cell, xs, state, "loop")
    with bfloat16_by_default():
        ours = results(cell, xs, state, "fused")
    close(ours, expected, torch.float32)
    assert all(isinstance(loop, Loop) for loop in loops(cell))


FOUR, FIVE = (f'extern "C" int number() {{ return {i}; }}' for i in (4, 5))


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """A folder for what is compiled that is not there yet, and an empty one for temporary files."""
    kept, aside = tmp_path / "cache" / "multint" / "loops", tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MULTINT_CACHE_DIR", raising=False)
    monkeypatch.setattr(machine, "header", lambda: "")  # which takes the compiler a second
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    monkeypatch.setattr(machine, "libraries", {})
    monkeypatch.setattr(tables, "told", set())
    return kept, aside


def again(source):
    """The number that a library gives in a process that has not loaded it yet."""
    machine.libraries.clear()
    return machine.library(source).number()


def test_a_library_is_kept_for_the_user_alone(folders, compilations, monkeypatch, tmp_path):
    kept, aside = folders
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # which is another's
    assert (again(FOUR), again(FOUR), len(compilations)) == (4, 4, 1)
    (library,) = kept.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (kept.parent, kept)] == [0o700, 0o700]
    assert stat.S_IMODE(library.stat().st_mode) == 0o600
    monkeypatch.setenv("MULTINT_CACHE_DIR", str(tmp_path / "named"))
    assert (again(FOUR), again(FOUR), len(compilations)) == (4, 4, 2)
    assert [path.name for path in (tmp_path / "named").iterdir()] == [library.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "cache", "named"]
    assert not [*aside.iterdir()]


@pytest.mark.parametrize("damage", ["cut", "zeroed", "emptied", "one bit"])
def test_a_damaged_library_is_compiled_again(damage, folders, compilations):
    again(FOUR)
    (kept,) = folders[0].iterdir()
    whole = kept.read_bytes()
    middle = len(whole) // 2
    kept.unlink()  # this process has it open
    kept.write_bytes(
        {
            "cut": whole[:3000],
            "zeroed": whole[: middle - 2000] + bytes(4000) + whole[middle + 2000 :],
            "emptied": b"",
            "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )
    kept.chmod(0o600)
    assert (again(FOUR), again(FOUR), len(compilations)) == (4, 4, 2)


def other_user(monkeypatch, kept, library):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def open_folder(monkeypatch, kept, library):
    kept.chmod(0o770)


def linked_folder(monkeypatch, kept, library):
    kept.rename(kept.with_name("elsewhere"))
    kept.symlink_to("elsewhere")


def open_file(monkeypatch, kept, library):
    library.chmod(0o602)


def linked_file(monkeypatch, kept, library):
    library.rename(library.with_name("elsewhere"))
    library.symlink_to("elsewhere")


def pipe(monkeypatch, kept, library):
    library.unlink()
    os.mkfifo(library)


UNSAFE = {
    other_user: "another user's",
    open_folder: "others can write to it",
    linked_folder: "it is a link",
    open_file: "",
    linked_file: "",
    pipe: "",
}


@pytest.mark.parametrize("unsafe", UNSAFE, ids=lambda make: make.__name__)
def test_what_another_user_can_have_written_is_not_loaded(unsafe, folders, compilations, monkeypatch):
    """Neither through a link; of a folder it is told once, and what is compiled there is loaded from elsewhere."""
    kept, aside = folders
    again(FOUR)
    (four,) = kept.iterdir()
    again(FIVE)
    (five,) = {*kept.iterdir()} - {four}
    five.replace(four)  # whole by its checksum, and not what is asked for
    unsafe(monkeypatch, kept, four)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = len(compilations)
        assert again(FOUR) == 4
        assert again(FOUR) == 4
    assert len(compilations) > before
    told = [str(warning.message) for warning in caught]
    assert len(told) == bool(UNSAFE[unsafe])
    assert all(UNSAFE[unsafe] in text and str(kept) in text and "MULTINT_CACHE_DIR" in text for text in told)
    assert not [*aside.iterdir()]


def test_a_user_without_a_folder_compiles_in_every_process(folders, compilations, monkeypatch, tmp_path):
    """A home that cannot be written to is nobody's mistake; a folder that is asked for by name is told of."""
    blocked = tmp_path / "blocked"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert (again(FOUR), again(FOUR), len(compilations)) == (4, 4, 2)
    monkeypatch.setenv("MULTINT_CACHE_DIR", str(blocked / "folder"))
    with pytest.warns(UserWarning, match="it cannot be made"):
        assert again(FOUR) == 4
    assert not [*folders[1].iterdir()]


COMPILERS = {
    "failed: an error: \ufffd\ufffd": r"printf 'an error: \377\376\n' >&2; exit 1",
    "the C\\+\\+ compiler failed": "echo some > $out; kill -9 $$",
    "has written nothing": r"printf '\377'",
    "cannot be compiled and loaded": "echo some > $out",
    "has not ended": "echo some > $out; sleep 60 & sleep 60",
}


@pytest.mark.parametrize("reason", COMPILERS)
def test_a_compiler_that_fails_leaves_nothing(reason, folders, monkeypatch, tmp_path):
    script = tmp_path / "c++"
    version = r"[ $1 = --version ] && printf '\377 1.0\n' && exit"
    script.write_text(f"#!/bin/sh\n{version}\nfor out; do :; done\n{COMPILERS[reason]}\n")
    script.chmod(0o755)
    monkeypatch.setattr(machine, "compiler", lambda: str(script))
    machine._version(str(script))
    monkeypatch.setattr(machine, "_TIME_LIMIT", 0.5 if reason == "has not ended" else 60.0)
    with pytest.raises(RefusedError, match=reason):
        machine.library(FOUR)
    assert not [*folders[0].iterdir(), *folders[1].iterdir()]


def test_threads_may_compile_the_same_at_once(folders):
    with ThreadPoolExecutor(3) as threads:
        assert [*threads.map(lambda _: again(FOUR), range(3))] == [4, 4, 4]
    assert len([*folders[0].iterdir()]) == 1


def test_on_another_kind_of_system_there_is_no_compiler(monkeypatch):
    machine.compiler.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(machine.os, "name", "nt")
        assert not machine.has_compiler()
    assert machine.has_compiler()


def test_a_compiler_that_does_not_run_is_none(monkeypatch):
    machine.compiler.cache_clear()
    monkeypatch.setenv("CXX", "/bin/false")
    try:
        assert machine.compiler() != "/bin/false"
        monkeypatch.setenv("PATH", "")
        machine.compiler.cache_clear()
        assert not machine.has_compiler()
    finally:
        machine.compiler.cache_clear()


def test_a_layer_is_compiled_ahead_of_time(compilations):
    layer = LSTM(3, 10, num_layers=2, batch_first=True)
    assert str(layer.precompile(torch.zeros(4, 5, 3))).count("by native code") == 4
    assert all(parameter.grad is None for parameter in layer.parameters())
    before = len(compilations)
    layer.engine = "fused"
    layer(torch.zeros(2, 7, 3))[0].sum().backward()
    assert len(compilations) == before
    with pytest.raises(OptionError, match="a layer has its own precompile"):
        precompile(layer, torch.zeros(4, 5, 3))


@pytest.mark.usefixtures("no_inductor")
def test_without_a_compiler_steps_run_from_python(monkeypatch):
    monkeypatch.setattr(machine, "compiler", no_compiler)
    cell = RNNCell(INPUT_SIZE, 12)  # of no other test's structure
    xs, state = inputs(cell, dtype=torch.float32)
    close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float32)
    assert "there is no C++ compiler" in str(explain(cell))


def test_what_is_kept_for_the_backward_pass_stays():
    """Two forward passes before the first backward pass, and two backward passes of one."""
    cell = built("lstm-mi", torch.float32)
    (first, state), (second, _) = (inputs(cell, steps, 3, torch.float32) for steps in (4, 6))
    outputs = [scan(cell, xs, state, engine="fused")[0].square().sum() for xs in (first, second)]
    expected = [scan(cell, xs, state, engine="loop")[0].square().sum() for xs in (first, second)]
    for ours, theirs in zip(outputs, expected, strict=True):
        leaves = [*state, *cell.parameters()]
        once = torch.autograd.grad(ours, leaves, retain_graph=True)
        close(once, torch.autograd.grad(theirs, leaves), torch.float32)
        torch.testing.assert_close(torch.autograd.grad(ours, leaves), once, rtol=0, atol=0)


@pytest.fixture
def compilations(monkeypatch):
    """What the C++ compiler is asked to make while the test runs."""
    made, original = [], machine._run

    def run(command):
        made.extend([command] if "-o" in command else [])
        return original(command)

    monkeypatch.setattr(machine, "_run", run)
    return made


def test_layers_of_one_structure_share_what_is_compiled(compilations):
    """Whatever their inputs' widths: the product of the inputs is not in the loop."""
    for width in (2, 9):
        cell = LSTMCell(width, 11)
        precompile(cell, normal(3, 2, width).float())
    assert len(compilations) <= 2, "a forward and a reverse loop"
    xs = normal(5, 3, 9).float().requires_grad_()
    before = len(compilations)
    scan(cell, xs, cell.initial_state(3), engine="fused")[0].sum().backward()
    assert len(compilations) == before
    assert str(explain(cell)).count("by native code") == 2


def test_auto_loops_where_there_is_no_compiler_unless_the_work_is_large(monkeypatch):
    cell = RNNCell(64, 64)
    monkeypatch.setattr(machine, "compiler", no_compiler)
    for worth, engine in ((10**7, "loop"), (10**5, "fused")):  # 50 · 30 · 8192 is 1.2e7, and the bound 100 times that
        monkeypatch.setattr("multint.engines.checks._WORTH_COMPILING", worth)
        told = explain(cell, torch.zeros(50, 30, 64))
        assert told.engine == engine
        assert ("no C++ compiler" in told.reason) == (engine == "loop")
    assert "no C++ compiler" in explain(cell, torch.zeros(2, 1, 64)).reason
