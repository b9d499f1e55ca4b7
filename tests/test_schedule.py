"""Every cell: its schedule is what executors rely on, and it prints."""

import re
from dataclasses import replace

import pytest
import torch

from multint import explain
from multint.engines.schedule import At, Call, Contraction, Extent, Product
from multint.integrators import outermost_integrators
from tests.both_engines import built
from tests.catalogue import CELLS, INPUT_SIZE, TYPICAL, normal

SECTIONS = ("once", "prologue", "entry", "forward", "reverse", "exit")


def whole(name):
    """The schedule that gives a catalogued cell all its gradients."""
    return explain(built(name), normal(4, 3, INPUT_SIZE), engine="fused")._program.whole()


def check(schedule):
    """Assert what executors rely on.

    Everything is written before it is read. No instruction reads what it writes over, and no value has two writers,
    except that gradients are added to: the first writer of each, or its clearing, does not add.
    """
    buffers = schedule.buffers
    assert all(name == buffer.name for name, buffer in buffers.items())
    given = {*schedule.inputs.values(), *schedule.invariants, *schedule.literals}
    given |= {schedule.output_gradient, *schedule.fields}.intersection(buffers).difference(schedule.states)
    there = {At(name, None) for name in given} | {At(n) for n in given if buffers[n].extent is Extent.ONE}
    there = check_section([*schedule.once, *schedule.prologue], there, set())
    given |= {at.buffer for at in there}
    there = check_section(schedule.entry, {At(n, later) for n in given for later in (0, None)}, set())
    given |= {at.buffer for at in there}
    fixed = {At(name) for name in given if buffers[name].extent in (Extent.ONE, Extent.EACH, Extent.BLOCK)}
    first = {At(name) for name in schedule.states}
    after = check_section(schedule.forward, fixed | first, set())
    assert {At(name, 1) for name in schedule.states} <= after, "a state is not written"
    if not schedule.reverse:
        return
    there = fixed | first | {at for at in after if at.buffer in schedule.kept}
    carried = {name for name in schedule.summands if buffers[name].extent is Extent.TURNS}
    cleared = {At(name) for name in schedule.cleared}
    constant = {At(name, 1) for name in schedule.cleared if buffers[name].extent is Extent.STATES}
    there |= {At(name, 1) for name in carried} | cleared | constant
    after = check_section(schedule.reverse, there, cleared)
    assert {At(name) for name in carried} <= after, "a state's gradient is not written"
    over_all = {At(at.buffer, None) for at in after if buffers[at.buffer].extent is not Extent.NOW} | after
    after = check_section(schedule.exit, over_all, set())
    assert schedule.summands <= {at.buffer for at in after}, "a gradient is not written"


def check_section(instructions, there, cleared):
    """What is there after the instructions, given what is there before them and what may be added to."""
    there, written = set(there), set(cleared)
    for instruction in instructions:
        for read in instruction.reads:
            assert read in there, f"{read} is read before it is written"
        for write, adds in instruction.writes.items():
            assert write not in instruction.reads, f"{write} is read and written by one instruction"
            assert adds == (write in written), f"{write} has two first writers, or none"
            assert adds or write not in there, f"{write} is written over"
        written.update(instruction.writes)
        there.update(instruction.writes)
    return there


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
