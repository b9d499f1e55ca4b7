"""The proof at the first use: whatever is wrong in what is run is seen there, and no user gets its numbers."""

import math
import shutil
import warnings
from dataclasses import replace

import pytest
import torch

from multint import GRUCell, LSTMCell, explain, scan
from multint.engines import decompositions, lowering, tables
from multint.engines.native import elements, machine
from multint.engines.native.loop import Loop
from multint.errors import EngineError
from tests.both_engines import Free, bfloat16_by_default, close, inputs, replace_everywhere, results
from tests.catalogue import INPUT_SIZE

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(shutil.which("g++") is None, reason="a native loop needs a C++ compiler"),
    pytest.mark.usefixtures("no_inductor", "poisoned", "worth_compiling"),
]

aten = torch.ops.aten


def header(old, new):
    """Other code in what all loops are compiled with."""

    def inject(patch):
        text = machine.header()
        assert old in text
        patch.setattr(machine, "header", lambda: text.replace(old, new))

    return inject


def rule(target, template):
    """Another C++ for an operation."""
    return lambda patch: patch.setitem(elements._RULES, target, elements.pointwise(template))


def decomposition(target, other):
    """Other plain operations for a composite one."""
    return lambda patch: patch.setitem(decompositions.plainer(), target, other)


def no_build(patch):
    patch.setattr(Loop, "build", lambda self: 1 / 0)


# What is wrong in generated code: the steps are run from Python.
IN_CODE = {
    "a function": header("const real y = (", "const real y = 1.01f * ("),
    "a product": header("sums[r][v] += left[r * inner + k]", "sums[r][v] += left[r * inner + (k | 1) % inner]"),
    "the last columns": header("j < there; ++j) to[j]", "j + 1 < there; ++j) to[j]"),
    "a sum over steps": header("sum[count + i] += sum[i]", "sum[count + i] = sum[i]"),
    "a rule": rule(aten.sigmoid.default, "(logistic({0}) + 0.01f)"),
    "a decomposition": decomposition(aten.sigmoid_backward.default, lambda d, y: d * y * (1 - y * y)),
    "nothing is there": no_build,
}


def wrong_derivative(patch):
    """A term of a gradient is left out."""

    def change(original):
        def vjp(*args):
            kernel, used = original(*args)
            add = next(n for n in reversed(kernel.module.graph.nodes) if n.target is aten.add.Tensor)
            add.replace_all_uses_with(add.args[0])
            kernel.module.recompile()
            return kernel, used

        return vjp

    replace_everywhere(patch, lowering.__name__, "vjp", change)


def in_the_schedule(change):
    """A schedule with gradients in which something is changed."""

    def inject(patch):
        def within(original):
            def lower(plan, wanted):
                schedule = original(plan, wanted)
                if wanted is not None:
                    change(schedule)
                return schedule

            return lower

        replace_everywhere(patch, lowering.__name__, "lower", within)

    return inject


def cotangents_swapped(schedule):
    """The gradient of one result for that of another."""
    call = schedule.reverse[0]
    *rest, one, other = call.reads
    schedule.reverse[0] = replace(call, reads=(*rest, other, one))


def steps_mixed_up(schedule):
    """The product before the piece that gives its left side: it takes the step's before."""
    schedule.reverse.reverse()


def steps_of_another_time(schedule):
    """A matrix's gradient by the left side that comes one step later."""
    contraction = schedule.exit[-1]
    schedule.exit[-1] = replace(contraction, left=contraction.left, right=contraction.right)
    schedule.exit.append(schedule.exit[-1])  # added twice


# What is wrong in the instructions: nobody can run them, so autograd gives the gradients.
IN_INSTRUCTIONS = {
    "a derivative": wrong_derivative,
    "cotangents": in_the_schedule(cotangents_swapped),
    "the order": in_the_schedule(steps_mixed_up),
    "a product twice": in_the_schedule(steps_of_another_time),
}


def told(caught):
    return [str(warning.message) for warning in caught if "multint" in str(warning.message)]


@pytest.mark.parametrize("name", IN_CODE)
def test_wrong_code_is_not_run(name, monkeypatch):
    """The steps are run from Python, and that is told once for each loop."""
    monkeypatch.setattr(tables, "told", set())
    IN_CODE[name](monkeypatch)
    number = [*IN_CODE].index(name)
    dtype = (torch.float32, torch.float64)[number % 2]
    cell = LSTMCell(INPUT_SIZE, 20 + number).to(dtype)  # of no other test's structure
    xs, state = inputs(cell, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), dtype)
    assert 1 <= len(told(caught)) == len({*told(caught)}) <= 2
    assert all("its native loop failed by" in message and "report" in message for message in told(caught))
    assert "by Python, step by step: it failed by" in str(explain(cell))


@pytest.mark.parametrize(("name", "engine"), [*((name, "auto") for name in IN_INSTRUCTIONS), ("a derivative", "fused")])
def test_wrong_instructions_are_not_run(name, engine, monkeypatch):
    """Whoever would run them, compiled or not."""
    monkeypatch.setattr(tables, "told", set())
    IN_INSTRUCTIONS[name](monkeypatch)
    number = 2 * [*IN_INSTRUCTIONS].index(name) + (engine == "auto")
    cell = LSTMCell(INPUT_SIZE, 40 + number).double()
    xs, state = inputs(cell)
    if engine == "fused":
        with pytest.raises(EngineError, match=r"UnprovedError: the gradient of .* is not what autograd gives"):
            results(cell, xs, state, engine)
        return
    expected = results(cell, xs, state, "loop")
    with pytest.warns(UserWarning, match=r"UnprovedError: the gradient of .* is not what autograd gives"):
        close(results(cell, xs, state, engine), expected, torch.float64)
    assert "UnprovedError" in explain(cell).reason
    close(results(cell, xs, state, engine), expected, torch.float64)  # without a warning, which would be an error


NARROW = {
    "above 0": lambda cell, x, h: ((h.log() + x @ cell.W) * cell.a).exp(),
    "below 1": lambda cell, x, h: (1 - h * h).sqrt() * (x @ cell.W).sigmoid(),
}


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("name", NARROW)
def test_numbers_within_a_steps_domain_are_found(name, wrong, monkeypatch):
    """NaN on both sides proves nothing."""
    monkeypatch.setattr(tables, "told", set())
    if wrong:
        rule(aten.sigmoid.default, "(logistic({0}) + 0.01f)")(monkeypatch)
        rule(aten.exp.default, "(1.01f * exponential({0}))")(monkeypatch)
    cell = Free(NARROW[name], hidden_size=9 + wrong).double()
    xs, state = inputs(cell)
    state = type(state)(state.h.detach().abs().clamp(0.1, 0.9).requires_grad_())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        close(results(cell, xs, state, "fused"), results(cell, xs, state, "loop"), torch.float64)
    assert bool(told(caught)) == wrong
    made = tables.record_of(cell).last.program().executors.values()
    assert all(isinstance(executor, Loop) != wrong for executor, _ in made)


def test_what_has_no_numbers_is_refused():
    """Once: the next call is not proved again."""
    cell = Free(lambda cell, x, h: (x @ cell.W - h) / (h - h) * math.inf).double()
    xs, state = inputs(cell)
    for _ in range(2):
        with pytest.raises(EngineError, match="the step has no finite numbers"):
            scan(cell, xs, state, "fused")
    close(results(cell, xs, state, "auto"), results(cell, xs, state, "loop"), torch.float64)
    assert "the step has no finite numbers" in explain(cell).reason


def test_it_knows_nothing_of_the_callers_modes():
    """Nor of its default dtype."""
    cell = GRUCell(INPUT_SIZE, 60)
    xs, state = inputs(cell, dtype=torch.float32)
    expected = results(cell, xs, state, "loop")
    with bfloat16_by_default(), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        actual, _ = scan(cell, xs, state, "fused")
    close(actual.clone(), expected[0], torch.float32)
    made = tables.record_of(cell).last.program().executors.values()
    assert all(isinstance(executor, Loop) for executor, _ in made)
