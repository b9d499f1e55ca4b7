"""What autograd says of a schedule: its results and gradients, and which results have a gradient at all.

Here autograd goes through the instructions operation by operation, which is slow and needs no reverse section.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from multint.engines.private import StandIns
from multint.engines.schedule import At, Call, Extent, Instruction, Product, Schedule

Reach: TypeAlias = dict[str, frozenset[str]]

_ROWS = 5  # of stand-ins: any number but 1, with which a step may do something else


def interpret(instructions: Sequence[Instruction], values: dict[At, Tensor]) -> None:
    """Run instructions once, operation by operation, so that autograd sees each."""
    for instruction in instructions:
        if isinstance(instruction, Call):
            results = instruction.kernel.module.forward(*(values[at] for at in instruction.reads))
            values.update(zip(instruction.writes, results, strict=True))
        elif isinstance(instruction, Product):
            values[instruction.result] = values[instruction.left] @ values[instruction.matrix]


def replay(schedule: Schedule, arguments: dict[str, Tensor], steps: int) -> list[Tensor]:
    """The output and each state after the last step, by the entry and the forward section."""
    state = [arguments[name] for name in schedule.states]
    rows = len(state[0])
    fixed = {At(n): v for n, v in arguments.items() if schedule.buffers[n].extent is Extent.ONE}
    streams = {n: v for n, v in arguments.items() if schedule.buffers[n].extent is Extent.EACH}
    values = fixed | {At(name, None): stream.flatten(0, 1) for name, stream in streams.items()}
    interpret(schedule.entry, values)
    products = [write for instruction in schedule.entry for write in instruction.writes]
    streams |= {at.buffer: values[at].unflatten(0, (steps, rows)) for at in products}
    outputs = []
    for t in range(steps):
        values = fixed | {At(name): stream[t] for name, stream in streams.items()}
        values |= {At(name): value for name, value in zip(schedule.states, state, strict=True)}
        interpret(schedule.forward, values)
        state = [values[At(name, 1)] for name in schedule.states]
        outputs.append(state[0])
    return [torch.stack(outputs), *state]


def gradients(
    schedule: Schedule,
    arguments: dict[str, Tensor],
    cotangents: Sequence[Tensor | None],
    steps: int,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """The gradients of the output and the last state: of those arguments that want one and that they reach."""
    leaves = {name: value for name, value in arguments.items() if value.requires_grad}
    with torch.enable_grad():
        pairs = zip(replay(schedule, arguments, steps), cotangents, strict=True)
        results, given = zip(*((r, c) for r, c in pairs if c is not None and r.requires_grad), strict=True)
        found = torch.autograd.grad(results, list(leaves.values()), given, create_graph=create_graph, allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def reach(schedule: Schedule, world: StandIns) -> Reach:
    """The arguments that a gradient of each field of the new state reaches over one step, the old fields among them.

    What a step detaches, or computes of whole numbers, has no gradient. Autograd follows one step on stand-ins.
    """
    buffers = schedule.buffers
    device = buffers[schedule.states[0]].device
    may = schedule.may_learn.union(schedule.states)
    with world.mode, torch.enable_grad(), torch.autocast(device.type, enabled=False):
        given = {}
        for name in schedule.arguments:
            shape = (_ROWS, *buffers[name].shape) if buffers[name].has_rows else buffers[name].shape
            value = torch.empty(shape, dtype=buffers[name].dtype, device=buffers[name].device)
            given[name] = value.requires_grad_(name in may and value.is_floating_point())
        values = {At(name, later): value for name, value in given.items() for later in (0, None)}
        interpret(schedule.entry, values)
        values |= {At(at.buffer): value for at, value in values.items()}
        interpret(schedule.forward, values)
    names = {id(value): name for name, value in given.items()}
    return {name: frozenset(names[id(leaf)] for leaf in _leaves(values[At(name, 1)])) for name in schedule.states}


def _leaves(result: Tensor) -> list[Tensor]:
    """Those of autograd's graph of a result."""
    if result.is_leaf:
        return [result] if result.requires_grad else []
    seen, found, stack = set(), [], [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [other for other, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found


def have_gradients(reach: Reach, wanted: frozenset[str], first: set[str], steps: int) -> list[bool]:
    """Whether the output, and each field of the last state, have one, as the loop's have.

    Which fields have one may change from step to step.

    Args:
        wanted: the arguments but for the state that want one.
        first: the fields of the first state that do.
    """
    output, *_ = reach
    learnt, any_output = first, False
    for _ in range(steps):
        before, learnt = learnt, {name for name, found in reach.items() if found & (wanted | learnt)}
        any_output = any_output or output in learnt
        if learnt == before:
            break  # soon all steps are alike
    return [any_output, *(name in learnt for name in reach)]


def reached(reach: Reach, given: Sequence[bool], steps: int) -> set[str]:
    """The arguments that gradients of the output and of each field of the last state reach, where they are given."""
    output, *_ = reach
    of_output, *of_last = given
    fields = {name for name, is_given in zip(reach, of_last, strict=True) if is_given}
    found: set[str] = set()
    before: set[str] | None = None
    for _ in range(steps):
        now = fields | {output} if of_output else fields
        if now == before:
            break  # all earlier steps are alike
        before = now
        arguments = set[str]().union(*(reach[name] for name in now))
        found |= arguments
        fields = arguments & reach.keys()
    return (found - reach.keys()) | fields
