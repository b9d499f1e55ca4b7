"""A prepared product has the numbers of `mm`, whatever of torch is missing, and new sizes take no memory for good."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import vmap

from multint import LSTMCell, scan
from multint.engines import onednn
from multint.engines.onednn import prepared_product
from tests.catalogue import normal

ROWS, INNER, OUTER = 256, 132, 164  # from 2^21 multiply-adds on, oneDNN multiplies
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# How the numbers of a matrix can lie in memory.
LAYOUTS = {
    "dense": lambda m: m.contiguous(),
    "transposed": lambda m: m.t().contiguous().t(),
    "columns": lambda m: torch.stack([m, m], 2).flatten(1)[:, ::2],
    "part": lambda m: torch.cat([m, m, m], 1)[:, m.shape[1] : 2 * m.shape[1]],
    "shifted": lambda m: torch.cat([m.new_zeros(1), m.flatten()])[1:].view(m.shape),
}


@pytest.fixture
def calls(monkeypatch):
    """The numbers of rows that oneDNN multiplies, its trial left out."""
    for dtype in TOLERANCE:
        onednn._multiplies(dtype)
    taken = []
    original = onednn._linear
    monkeypatch.setattr(onednn, "_linear", lambda left, weight: taken.append(len(left)) or original(left, weight))
    return taken


@pytest.fixture
def untried():
    """No part of torch has been tried yet, neither before nor after."""
    onednn._multiplies.cache_clear()
    yield
    onednn._multiplies.cache_clear()


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_agrees_with_mm(dtype, layout):
    """By the norm: single numbers near 0 are off by more."""
    left, right = (
        LAYOUTS[layout](normal(*shape, seed=i).to(dtype)) for i, shape in enumerate([(ROWS, INNER), (INNER, OUTER)])
    )
    for times in (1, 100):
        multiply = prepared_product(right, ROWS, times)
        for rows in (left, left.flip(0)):
            actual, expected = multiply(rows), rows.double() @ right.double()
            assert actual.dtype == dtype
            assert actual.shape == expected.shape
            error = (actual.double() - expected).norm() / expected.norm()
            torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=TOLERANCE[dtype])


@every_dtype
def test_onednn_takes_many_large_ones_whose_rows_are_a_power_of_two(dtype, calls, monkeypatch):
    if not onednn._multiplies(dtype):
        pytest.skip(f"oneDNN does not multiply {dtype} here")

    def multiply(rows, times, inner=128, dtype=dtype):
        prepared_product(torch.ones(inner, 128, dtype=dtype), rows, times)(torch.ones(rows, inner, dtype=dtype))

    for rows in range(100, 1100):
        multiply(rows, times=8)
    assert calls == [128, 256, 512, 1024]
    del calls[:]
    multiply(128, times=7)
    multiply(128, times=8, inner=127)
    multiply(128, times=8, dtype=torch.float64)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    multiply(128, times=8)
    assert calls == []


@pytest.mark.usefixtures("eager")
def test_new_sizes_take_no_memory_for_good():
    """oneDNN keeps .5 to 2 MiB for each size of each product that it has met."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("the memory of a process is not told here")
    cell = LSTMCell(32, 128)

    def train(rows):
        output, _ = scan(cell, torch.ones(8, rows, 32), cell.initial_state(rows), engine="fused")
        output.sum().backward()

    def resident():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    for rows in (340, 39):
        train(rows)
    before = resident()
    for rows in range(40, 340, 6):  # where each has its own programs, 200 MiB
        train(rows)
    assert resident() - before < 80


class Raising:
    @staticmethod
    def default(*arguments):
        raise RuntimeError("could not create a primitive descriptor")


def off_by_one(name):
    original = getattr(torch.ops.mkldnn, name)

    def wrong(*arguments):
        return original(*arguments) + 1

    wrong.default = wrong
    return wrong


def never(*arguments):
    raise AttributeError


FAULTS = {
    "no linear": lambda: ("_linear_pointwise", SimpleNamespace()),
    "linear raises": lambda: ("_linear_pointwise", Raising),
    "linear is wrong": lambda: ("_linear_pointwise", off_by_one("_linear_pointwise")),
    "no reorder": lambda: ("_reorder_linear_weight", never),
    "reorder is wrong": lambda: ("_reorder_linear_weight", lambda weight, rows: -weight),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_onednn_products_are_plain(fault, monkeypatch, untried):
    """The verdict is for good: what failed once is not tried again."""
    with monkeypatch.context() as broken:
        broken.setattr(torch.ops.mkldnn, *FAULTS[fault]())
        test_it_agrees_with_mm(torch.float32, "columns")
        assert not onednn._multiplies(torch.float32)
    assert not onednn._multiplies(torch.float32)


def test_bf16_is_plain_where_torch_does_not_report_it(monkeypatch, untried):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not onednn._multiplies(torch.bfloat16)
    test_it_agrees_with_mm(torch.bfloat16, "dense")


def test_no_onednn_in_this_torch(monkeypatch, untried):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn._multiplies(torch.float32)


def test_the_trial_knows_nothing_of_its_caller(untried):
    """The first product of all may be one that is traced, differentiated or cast: the verdict is the same."""
    verdict = onednn._multiplies(torch.float32)
    contexts = {
        "fake tensors": FakeTensorMode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode(),
        "forward differentiation": forward_ad.dual_level(),
        "device": torch.device("meta"),
    }
    for name, context in contexts.items():
        onednn._multiplies.cache_clear()
        with context:
            assert onednn._multiplies(torch.float32) == verdict, name
    onednn._multiplies.cache_clear()
    vmap(lambda x: x if onednn._multiplies(torch.float32) == verdict else None)(torch.zeros(2))


def test_the_trial_leaves_the_random_numbers_alone(untried):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    onednn._multiplies(torch.float32)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
