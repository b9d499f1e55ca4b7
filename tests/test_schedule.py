"""A schedule is whole, it prints, and its checker finds what is wrong."""

import re
from dataclasses import replace

import pytest
import torch

from multint import explain
from multint.engines.schedule import Call, Extent, Product
from tests.both_engines import SECTIONS, built, check, is_whole
from tests.catalogue import INPUT_SIZE, TYPICAL, normal

pytestmark = pytest.mark.compiles


def whole(name):
    """The schedule that gives a catalogued cell all its gradients."""
    return explain(built(name), normal(4, 3, INPUT_SIZE), engine="fused")._program.whole()


# All others are looked at where they run: see test_native.py.
@pytest.mark.parametrize("name", TYPICAL)
def test_a_schedule_is_whole(name):
    is_whole(whole(name), built(name))


@pytest.mark.parametrize("name", TYPICAL)
def test_a_printed_schedule_names_every_buffer_that_is_there_for_all_steps(name):
    schedule = whole(name)
    text = schedule.show(4, 3)
    for buffer in schedule.buffers.values():
        if buffer.extent in (Extent.EACH, Extent.STATES):
            (line,) = re.findall(rf"^  {re.escape(buffer.name)} +\((\d+), 3.*$", text, re.MULTILINE)
            assert int(line) == (4 if buffer.extent is Extent.EACH else 5)
    assert "object at" not in text


def without(section, index):
    def change(schedule):
        del getattr(schedule, section)[index]

    return change


def first_writer_adds(schedule):
    call = next(instruction for instruction in schedule.reverse if isinstance(instruction, Call))
    place = schedule.reverse.index(call)
    first = next(write for write, adds in call.writes.items() if not adds)
    schedule.reverse[place] = replace(call, writes=call.writes | {first: True})


def two_first_writers(schedule):
    schedule.reverse.append(schedule.reverse[0])


def not_cleared(schedule):
    schedule.cleared.clear()


def read_too_early(schedule):
    schedule.forward.reverse()


def written_over(schedule):
    product = next(instruction for instruction in schedule.forward if isinstance(instruction, Product))
    schedule.forward[schedule.forward.index(product)] = replace(product, result=product.left)


WRONG = {
    "a product is missing": without("forward", 0),
    "the last kernel is missing": without("forward", -1),
    "the reverse kernel is missing": without("reverse", 0),
    "a state's gradient is missing": without("reverse", -1),
    "a matrix's gradient is missing": without("exit", -1),
    "the hoisted product is missing": without("entry", -1),
    "the first writer adds": first_writer_adds,
    "two first writers": two_first_writers,
    "nothing is cleared": not_cleared,
    "read too early": read_too_early,
    "written over": written_over,
}


@pytest.mark.parametrize("name", WRONG)
def test_the_checker_finds_what_is_wrong(name):
    schedule = whole("lstm-mi")
    copied = {field: list(getattr(schedule, field)) for field in (*SECTIONS, "cleared")}
    copy = replace(schedule, **copied)
    check(schedule)
    WRONG[name](copy)
    with pytest.raises(AssertionError):
        check(copy)


def test_the_budget_counts_what_the_backward_pass_keeps():
    """By hand, for an MI-LSTM: Wx and Uh of four gates, h and c, in float64."""
    schedule = whole("lstm-mi")
    hidden = schedule.buffers["h"].shape[0]
    assert schedule.bytes_per_row == 8 * (4 * hidden + 4 * hidden + 2 * hidden)
    assert set(schedule.kept) == {"c", "Wx", "Uh", "h"}
    assert schedule.buffers["h"].dtype == torch.float64
