"""Every cell: its schedule is checked, it prints, and its checker finds what is wrong."""

import re
from dataclasses import replace

import pytest
import torch

from multint import explain
from multint.engines import schedule as schedules
from multint.engines.schedule import At, Call, Contraction, Extent, Product, RowSum, check
from multint.integrators import outermost_integrators
from tests.both_engines import built
from tests.catalogue import CELLS, INPUT_SIZE, TYPICAL, normal

SECTIONS = ("prelude", "beside", "prologue", "entry", "forward", "reverse", "exit", "epilogue")


def whole(name):
    """The schedule that gives a catalogued cell all its gradients."""
    return explain(built(name), normal(4, 3, INPUT_SIZE), engine="fused")._program.whole()


@pytest.mark.parametrize("name", CELLS)
def test_every_schedule_is_whole(name):
    schedule = whole(name)
    check(schedule)
    assert schedule.gradients.keys() == set(schedule.arguments)
    instructions = [instruction for section in SECTIONS for instruction in getattr(schedule, section)]
    named = {at.buffer for instruction in instructions for at in (*instruction.reads, *instruction.writes)}
    assert named <= schedule.buffers.keys()
    for instruction in instructions:
        if isinstance(instruction, Call):
            graph = instruction.kernel.module.graph
            assert len([node for node in graph.nodes if node.op == "placeholder"]) == len(instruction.reads)
            assert len(graph.output_node().args[0]) == len(instruction.writes)
    # No weight's gradient is accumulated in the loop: each matrix has one contraction after it.
    products = [i for i in [*schedule.entry, *schedule.forward] if isinstance(i, Product)]
    contracted = [instruction.result.buffer for instruction in schedule.exit if isinstance(instruction, Contraction)]
    gradients = {gradient for product in products for gradient in schedule.gradients[product.matrix.buffer]}
    assert len(contracted) == len(set(contracted))
    assert gradients.issuperset(contracted)
    assert contracted or not any(parameter.requires_grad and parameter.ndim == 2 for parameter in recurrent(name))


def recurrent(name):
    """A catalogued cell's matrices that meet the state in a product of rows."""
    cell = built(name)
    return [cell.get_parameter(f"{k}.{w}") for k, f in outermost_integrators(cell).items() for w in f.z_weights]


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


def sum_of_nothing(schedule):
    place = next(i for i, instruction in enumerate(schedule.epilogue) if isinstance(instruction, RowSum))
    schedule.epilogue[place] = replace(schedule.epilogue[place], source=At("nothing"))


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
    "a sum of nothing": sum_of_nothing,
}


@pytest.mark.parametrize("name", WRONG)
def test_the_checker_finds_what_is_wrong(name):
    schedule = whole("lstm-mi")
    lists = (*SECTIONS, "arguments", "states", "cleared")
    copied = {field: list(getattr(schedule, field)) for field in lists}
    copy = schedules.Schedule(dict(schedule.buffers), **copied, gradients=schedule.gradients)
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
