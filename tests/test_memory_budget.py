"""A scan that would keep more than the budget is cut in time; one that fits is not, and nothing is computed twice."""

import re

import pytest
import torch

from multint import Recurrent, explain
from multint.engines import kernel, run
from tests.both_engines import built, compare, inputs, results
from tests.catalogue import HIDDEN_SIZE, INPUT_SIZE, normal

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("poisoned", "eager")]

T, B = 7, 3

cells = pytest.mark.parametrize("name", ["rnn-additive", "lstm-bilinear", "gru-mi", "own-leaky"])


def parts(cell, xs):
    """How many parts a scan is cut into, and of how many steps, as it is told."""
    told = re.search(r"(\d+) parts? of (\d+) steps?", explain(cell, xs, engine="fused").plan)
    return (int(told[1]), int(told[2])) if told else (1, len(xs))


@pytest.fixture
def needed(monkeypatch):
    """The smallest budget, in bytes, in which a scan fits whole; it is found by trying, and then is the budget."""

    def find(cell, xs):
        low, high = 0, 2**30  # too little, enough
        while high - low > 1:
            middle = (low + high) // 2
            monkeypatch.setattr(run, "MEMORY_BUDGET", middle)
            low, high = (low, middle) if parts(cell, xs)[0] == 1 else (middle, high)
        monkeypatch.setattr(run, "MEMORY_BUDGET", high)
        return high

    return find


@cells
def test_a_memory_budget_cuts_a_scan_in_time(name, monkeypatch, needed):
    cell = built(name)
    xs = normal(T, B, INPUT_SIZE, requires_grad=True)
    whole = needed(cell, xs)
    monkeypatch.setattr(run, "MEMORY_BUDGET", 3 * whole // T)
    assert parts(cell, xs) == (3, 3)
    compare(cell, T, B)
    # Less than one step takes one step at a time.
    monkeypatch.setattr(run, "MEMORY_BUDGET", 1)
    assert parts(cell, xs) == (T, 1)
    compare(cell, T, B)


@pytest.mark.parametrize("name", ["lstm-bilinear", "gru-mi"])
def test_a_part_is_computed_again_with_the_weights_of_its_call(name, monkeypatch):
    """And not with those of the module at the time of the backward pass."""
    monkeypatch.setattr(run, "MEMORY_BUDGET", 1)
    cell, xs = built(name), normal(T, B, INPUT_SIZE, requires_grad=True)
    layer = Recurrent(INPUT_SIZE, HIDDEN_SIZE, lambda *_: cell, weight_drop=0.5)
    outcomes = []
    for layer.engine in ("loop", "fused"):
        torch.manual_seed(0)
        (gradient,) = torch.autograd.grad(layer(xs)[0].square().sum(), xs)
        outcomes.append(gradient)
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-10)


@cells
def test_what_fits_exactly_is_computed_once_and_a_byte_less_is_cut(name, monkeypatch, needed):
    """By the number of pieces that are run in both passes."""
    cell = built(name)
    xs, state = inputs(cell, T, B)
    calls, original = [], kernel.Kernel.eagerly
    monkeypatch.setattr(kernel.Kernel, "eagerly", lambda *args: calls.append(1) or original(*args))

    def pieces(allowed):
        monkeypatch.setattr(run, "MEMORY_BUDGET", allowed)
        calls.clear()
        results(cell, xs, state, "fused")
        return len(calls)

    exact = needed(cell, xs)
    without_limit = pieces(2**40)
    assert pieces(exact) == without_limit
    assert parts(cell, xs) == (1, T)
    assert pieces(exact - 1) > without_limit
    assert parts(cell, xs) == (2, T - 1)


@cells
def test_the_budget_is_for_steps_and_rows(name, needed):
    cell = built(name)
    one, longer, wider = (needed(cell, normal(T * i, B * j, INPUT_SIZE)) for i, j in ((1, 1), (2, 1), (1, 2)))
    assert longer == wider == 2 * one
