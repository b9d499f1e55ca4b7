"""Under `auto` no failure within the engine reaches the user, and under every engine the step's own errors do."""

import functools
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from multint import Cell, LSTMCell, MultintError, Recurrent, explain, scan
from multint.cells import HiddenState
from multint.engines.failures import RefusedError
from multint.engines.native import machine
from multint.errors import EngineError
from tests.both_engines import ENGINES, Free, close, inputs, replace_everywhere, results, right_or_refused, weight
from tests.catalogue import HIDDEN_SIZE, INPUT_SIZE, normal

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("worth_compiling")]

# What can fail within the engine, by module and name.
STAGES = {
    "tracing": ("multint.engines.capture", "capture"),
    "planning": ("multint.engines.plan", "plan"),
    "lowering": ("multint.engines.lowering", "lower"),
    "running": ("multint.engines.sections", "Pieces.over"),
}
ERRORS = (RuntimeError, KeyError, ImportError, AssertionError, RecursionError, MemoryError, NotImplementedError)


class Failure:
    """Makes a function raise while the failure is on."""

    def __init__(self, error):
        self.error, self.on, self.raised = error, False, 0

    def within(self, original):
        @functools.wraps(original)
        def fail(*args, **kwargs):
            if self.on:
                self.raised += 1
                raise self.error
            return original(*args, **kwargs)

        return fail


def own_cell():
    """A cell of a class that nobody has run: no program of another test is its."""

    class Own(Cell):
        def __init__(self):
            super().__init__(INPUT_SIZE, HIDDEN_SIZE)
            self.W, self.U = weight(INPUT_SIZE, HIDDEN_SIZE), weight(HIDDEN_SIZE, HIDDEN_SIZE)

        def step(self, x, state):
            return HiddenState((x @ self.W + (state.h * state.h) @ self.U).tanh())

        def initial_state(self, batch_size):
            return HiddenState(self.zeros(batch_size, self.hidden_size))

    return Own().float()


def run(cell, xs, state, engine, failure, in_backward):
    """Outputs and gradients, with the failure in one of the passes."""
    failure.on = not in_backward
    output, final = scan(cell, xs, state, engine=engine)
    failure.on = True
    leaves = [xs, *state, *cell.parameters()]
    gradients = torch.autograd.grad(output.square().sum() + final.h.sum(), leaves)
    failure.on = False
    return [output, *final, *gradients]


CASES = [(stage, error, False) for stage in STAGES for error in ERRORS[: 7 if stage in ("tracing", "running") else 2]]
CASES += [("running", error, True) for error in ERRORS[:2]]


@pytest.fixture
def failing(monkeypatch, request):
    """The stage that fails, with an error that tells which."""
    stage, error, in_backward = request.param
    failure = Failure(error(f"injected while {stage}, {error.__name__}, {in_backward}"))
    replace_everywhere(monkeypatch, *STAGES[stage], failure.within)
    return failure, in_backward


def case_name(case):
    return f"{case[0]}-{case[1].__name__}{'-in-backward' * case[2]}"


@pytest.mark.parametrize("failing", CASES, indirect=True, ids=case_name)
@pytest.mark.usefixtures("eager")
def test_a_failure_within_the_engine_loops_under_auto_with_one_warning(failing):
    """Twice, so that the second call neither fails nor warns again; what was wrong can be read."""
    failure, in_backward = failing
    cell = own_cell()
    xs, state = inputs(cell)
    expected = run(cell, xs, state, "loop", Failure(None), False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            close(run(cell, xs, state, "auto", failure, in_backward), expected, torch.float32)
    assert failure.raised, "the failure never came: its place has another name"
    # Inductor warns of its own when it is first imported.
    (message,) = [str(warning.message) for warning in caught if "multint" in str(warning.message)]
    assert type(failure.error).__name__ in message
    assert "injected while" in message
    assert "report" in message
    assert "injected while" in str(explain(cell))


@pytest.mark.parametrize("failing", [case for case in CASES if case[1] is RuntimeError], indirect=True, ids=case_name)
@pytest.mark.usefixtures("eager")
def test_a_failure_within_the_engine_is_an_engine_error_by_name(failing):
    failure, in_backward = failing
    cell = own_cell()
    xs, state = inputs(cell)
    with pytest.raises(EngineError, match="injected while") as raised:
        run(cell, xs, state, "fused", failure, in_backward)
    assert raised.value.__cause__ is failure.error


@pytest.mark.parametrize("engine", ["fused", "auto"])
def test_what_cannot_be_compiled_runs_op_by_op_and_is_told_once(engine, monkeypatch):
    """Neither as a native loop nor by pieces, in either pass."""

    def refuse():
        raise RefusedError("a test of the pieces")

    monkeypatch.setattr(machine, "compiler", refuse)
    failure = Failure(RuntimeError(f"injected while compiling, {engine}"))
    replace_everywhere(monkeypatch, "multint.engines.kernel", "Kernel._compile", failure.within)
    failure.on = True
    # Of no other test's sizes: equal graphs share what was compiled.
    cell = Free(lambda cell, x, h: (x @ cell.W + (h * h) @ cell.U).tanh(), hidden_size=21 + len(engine)).float()
    xs, state = inputs(cell, dtype=torch.float32)
    expected = results(cell, xs, state, "loop")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            close(results(cell, xs, state, engine), expected, torch.float32)
    (message,) = [str(warning.message) for warning in caught if "multint" in str(warning.message)]
    assert "injected while" in message
    assert "op by op" in message


@pytest.mark.usefixtures("eager")
def test_what_is_no_failure_passes(monkeypatch):
    """Ctrl-C while a step is traced."""
    failure = Failure(KeyboardInterrupt())
    replace_everywhere(monkeypatch, *STAGES["tracing"], failure.within)
    failure.on = True
    cell = own_cell()
    xs, state = inputs(cell)
    with pytest.raises(KeyboardInterrupt):
        scan(cell, xs, state)
    failure.on = False
    close(results(cell, xs, state, "auto"), results(cell, xs, state, "loop"), torch.float32)
    assert explain(cell).engine == "fused"


WITHOUT = """
import os, sys, warnings, torch, multint
from multint.engines import checks
checks._WORTH_COMPILING = 0
os.environ["PATH"] = ""  # no compiler, and so no native loop, which needs no Inductor
cell, xs = multint.LSTMCell(5, 7), torch.randn(4, 3, 5)
for module in {modules!r}:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, module
        continue
    sys.modules[module] = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = [multint.scan(cell, xs, cell.initial_state(3), engine=e)[0] for e in ("auto", "auto", "loop")]
    assert all(output.allclose(outputs[2], atol=1e-6) for output in outputs)
    print([str(warning.message) for warning in caught if "multint" in str(warning.message)], flush=True)
    os._exit(0)
"""


def test_without_a_private_part_of_torch_a_scan_runs_and_says_so_once():
    """In an interpreter of its own, where that part cannot be imported."""
    modules = ("torch.fx.experimental.proxy_tensor", "torch._subclasses.fake_tensor", "torch._inductor.compile_fx")
    code = WITHOUT.format(modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module, line in zip(modules, done.stdout.splitlines(), strict=True):
        (message,) = eval(line)
        assert module in message


class OwnError(Exception):
    """An error of the user's own."""


def raising(error):
    def step(cell, x, h):
        raise error

    return step


def without_end(cell, x, h):
    return without_end(cell, x, h)


def asserting(cell, x, h):
    assert cell.input_size < 0, "features"
    return h


STEP_ERRORS = {
    "shapes": lambda cell, x, h: x @ cell.U + h,
    "index": lambda cell, x, h: h * x[:, 100:101][0, 0],
    "stack": lambda cell, x, h: torch.stack([x, h]),
    "attribute": lambda cell, x, h: cell.missing * h,
    "key": lambda cell, x, h: {}["missing"],
    "zero": lambda cell, x, h: h * (1 / 0),
    "value": raising(ValueError("my own message")),
    "own": raising(OwnError("my own kind", 2)),
    "multint": raising(MultintError("a shape that does not fit")),
    "features": lambda cell, x, h: nn.functional.linear(x, cell.U[:, :3]),
    "recursion": without_end,
    "not-implemented": raising(NotImplementedError("later")),
    "assertion": raising(AssertionError()),
    "assert": asserting,
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", STEP_ERRORS)
def test_the_steps_own_errors_are_raised_as_the_loop_raises_them(name):
    """Of the same type and message, at every call; with more rows than a trial would take."""
    cell = Free(STEP_ERRORS[name]).float()
    xs, state = inputs(cell, 4, 9)
    raised = []
    for which in ("loop", *ENGINES, *ENGINES):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            scan(cell, xs, state, engine=which)
        # How deep the stack was tells where it ran out.
        message = "" if name == "recursion" else str(caught.value)
        raised.append((type(caught.value), message))
    assert raised[1:] == raised[:1] * 4


@pytest.mark.usefixtures("eager")
def test_an_error_that_the_step_raises_once_is_not_kept():
    """A mistake that is mended in between, such as a buffer of the wrong size."""
    cell = Free(lambda cell, x, h: (x @ cell.W + h * cell.seen).tanh()).double()
    xs, state = inputs(cell)
    cell.seen = torch.ones(3, 4, 5).double()
    with pytest.raises(RuntimeError, match="must match"):
        scan(cell, xs, state, engine="fused")
    cell.seen = torch.ones(HIDDEN_SIZE).double()
    close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float64)


class Streams(Cell):
    """A cell of two streams."""

    def __init__(self):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.W, self.U = weight(INPUT_SIZE, HIDDEN_SIZE), weight(HIDDEN_SIZE, HIDDEN_SIZE)

    def step(self, x, state):
        return HiddenState((x["x"] @ self.W * x["y"] + state.h @ self.U).tanh())

    def initial_state(self, batch_size):
        return HiddenState(self.zeros(batch_size, HIDDEN_SIZE))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 1, HIDDEN_SIZE), (4,)], ids=str)
def test_a_stream_of_another_number_of_rows_is_refused_by_name_and_looped_by_auto(shape):
    """It meets the rows of the others by broadcasting."""
    cell = Streams().float()
    xs = {"x": normal(4, 3, INPUT_SIZE).float(), "y": normal(*shape).float().requires_grad_()}
    state = HiddenState(normal(3, HIDDEN_SIZE).float())
    for streams in (xs, {"y": xs["y"], "x": xs["x"]}):
        close(results(cell, streams, state, "auto"), results(cell, streams, state, "loop"), torch.float32)
        with pytest.raises(EngineError, match="rows"):
            scan(cell, streams, state, engine="fused")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("engine", "kind"), [("fused", MultintError), ("auto", (MultintError, RuntimeError))])
def test_streams_whose_rows_do_not_fit_are_a_clear_error(engine, kind):
    cell = Streams().float()
    xs = {"x": normal(4, 3, INPUT_SIZE).float(), "y": normal(4, 2, 1).float()}
    with pytest.raises(kind, match=r"rows|batch size|must match the size"):
        scan(cell, xs, HiddenState(normal(3, HIDDEN_SIZE).float()), engine=engine)


@pytest.mark.usefixtures("eager")
def test_meta_tensors_are_refused_by_name_and_looped_by_auto():
    cell = LSTMCell(INPUT_SIZE, HIDDEN_SIZE).to("meta")
    xs = torch.empty(4, 3, INPUT_SIZE, device="meta")
    with pytest.raises(EngineError, match="meta"):
        scan(cell, xs, cell.initial_state(3), engine="fused")
    output, _ = scan(cell, xs, cell.initial_state(3))
    assert output.shape == (4, 3, HIDDEN_SIZE)
    assert output.is_meta


def test_a_layer_that_loops_can_be_explained():
    rnn = Recurrent(INPUT_SIZE, HIDDEN_SIZE, LSTMCell, bidirectional=True, engine="loop")
    rnn(torch.randn(4, 3, INPUT_SIZE))
    told = rnn.explain()
    assert [one.engine for one in told] == ["loop", "loop"]
    assert all("asked" in one.reason for one in told)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("engine", ["loop", "auto", "fused"])
def test_a_printed_explanation_has_words_and_no_addresses(engine):
    rnn = Recurrent(INPUT_SIZE, HIDDEN_SIZE, LSTMCell, engine=engine)
    rnn(torch.randn(4, 3, INPUT_SIZE))
    for printed in (str(rnn.explain()), str(rnn.explain()[0])):
        assert f"engine: {'loop' if engine == 'loop' else 'fused'}" in printed
        assert " at 0x" not in printed


class Unequal:
    """Whoever compares it is told off."""

    __hash__ = None

    def __eq__(self, other):
        raise OwnError("not to be compared")


class Secretive:
    """Whoever looks at it is told off."""

    def __getattr__(self, name):
        raise OwnError("not to be looked at")


class Uncopied:
    """Whoever copies it is told off."""

    def __reduce_ex__(self, protocol):
        raise OwnError("not to be copied")


class Back:
    """An object that knows its owner."""

    def __init__(self, owner):
        self.owner = owner


def holding_itself(_):
    entries = []
    entries.append(entries)
    return entries


def deep(_):
    entry = []
    for _ in range(20_000):
        entry = [entry]
    return entry


AWKWARD = {
    "lock": lambda cell: threading.Lock(),
    "generator": lambda cell: (i for i in range(3)),
    "file": lambda cell: sys.stdout,
    "module": lambda cell: torch,
    "thread-local": lambda cell: threading.local(),
    "list-of-itself": holding_itself,
    "back-reference": Back,
    "the-cell": lambda cell: [cell],
    "deep": deep,
    "unequal": lambda cell: Unequal(),
    "secretive": lambda cell: Secretive(),
    "uncopied": lambda cell: Uncopied(),
    "random-generator": lambda cell: torch.Generator(),
    "long": lambda cell: list(range(100_000)),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", AWKWARD)
def test_attributes_that_nobody_can_walk_or_compare(name):
    """The step does not read them."""
    cell = Free(lambda cell, x, h: (x @ cell.W + h @ cell.U).tanh()).float()
    cell.extra = AWKWARD[name](cell)
    right_or_refused(cell, *inputs(cell))
