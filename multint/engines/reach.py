"""Which results of a scan have a gradient, and which arguments it reaches: what autograd would find of the loop.

What a step detaches, or computes of whole numbers, has no gradient, and which fields that concerns may change from step
to step. So one step is followed by autograd, on tensors without numbers, for each set of fields that have a gradient
before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multint.engines.pieces import interpret
from multint.engines.private import StandIns
from multint.engines.schedule import At, Buffer, Schedule
from multint.engines.step import unaware
from multint.engines.tables import TRACING


class Step(NamedTuple):
    """One step: whether each field of the new state has a gradient, and the arguments that it reaches."""

    learnt: tuple[bool, ...]
    reached: tuple[frozenset[str], ...]


class Reach:
    """The reach of gradients in a schedule where the arguments of some names want them."""

    def __init__(self, schedule: Schedule, wanted: frozenset[str], world: StandIns) -> None:
        self._schedule, self._wanted, self._world = schedule, wanted, world
        self._kept: dict[tuple[bool, ...], Step] = {}

    def path(self, first: tuple[bool, ...], steps: int) -> Path:
        """That of so many steps, by which fields of the first state want a gradient."""
        runs: list[tuple[Step, int]] = []
        learnt = first
        while steps:
            step = self._kept.get(learnt)
            if step is None:
                with TRACING:  # the stand-ins' world is all threads'
                    step = self._kept[learnt] = unaware(self._step, learnt)
            times = steps if step.learnt == learnt else 1  # soon all steps are alike
            runs.append((step, times))
            steps, learnt = steps - times, step.learnt
        return Path(runs, self._schedule.states)

    def _step(self, learnt: tuple[bool, ...]) -> Step:
        schedule = self._schedule
        wanted = self._wanted.union(name for name, wants in zip(schedule.states, learnt, strict=True) if wants)
        device = schedule.buffers[schedule.states[0]].device.type
        with self._world.mode, torch.enable_grad(), torch.autocast(device, enabled=False):
            given = {name: _one_row(schedule.buffers[name], name in wanted) for name in schedule.arguments}
            values = {At(name, later): value for name, value in given.items() for later in (0, None)}
            interpret(schedule.entry, values)
            values |= {At(at.buffer): value for at, value in values.items()}
            interpret(schedule.forward, values)
        names = {id(value): name for name, value in given.items()}
        new = [values[At(name, 1)] for name in schedule.states]
        return Step(tuple(field.requires_grad for field in new), tuple(_reached(field, names) for field in new))


class Path:
    """The reach of gradients over the steps of one scan, given as runs of steps that are alike."""

    def __init__(self, runs: list[tuple[Step, int]], states: list[str]) -> None:
        self._runs, self._states = runs, states

    @property
    def results(self) -> list[bool]:
        """Whether the output, and each field of the final state, have a gradient."""
        return [any(step.learnt[0] for step, _ in self._runs), *self._runs[-1][0].learnt]

    def arguments(self, given: Sequence[bool]) -> set[str]:
        """The arguments that gradients of those results reach which are given one."""
        found: set[str] = set()
        after = {i for i, is_given in enumerate(given[1:]) if is_given}  # the fields after a step with a gradient
        for step, times in reversed(self._runs):
            last: set[int] | None = None
            for _ in range(times):
                fields = after | {0} if given[0] else after
                if fields == last:
                    break  # all before it in the run is the same
                last = fields
                reached = frozenset[str]().union(*(step.reached[i] for i in fields))
                found |= reached.difference(self._states)
                after = {i for i, name in enumerate(self._states) if name in reached}
        return found.union(self._states[i] for i in after)


def _one_row(buffer: Buffer, wants: bool) -> Tensor:
    return buffer.empty(1).requires_grad_(wants and buffer.dtype.is_floating_point)


def _reached(result: Tensor, names: dict[int, str]) -> frozenset[str]:
    """The leaves of a result's graph, by name."""
    if not result.requires_grad:
        return frozenset()
    if result.is_leaf:
        return frozenset({names[id(result)]})
    seen, found = set(), set()
    stack = [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [other for other, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.add(names[id(node.variable)])
    return frozenset(found)
