"""The proof of what is run: at its first use, a loop's numbers are compared with autograd's.

Autograd goes through the forward section operation by operation, in float64. It shares nothing with a native loop but
the graph of the step: neither the derivatives of its pieces, nor the order of the reverse section, nor any generated
code. So whatever is wrong in these is seen here, and never by a user.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from multint.engines import by_autograd
from multint.engines.schedule import Call, Extent, Instruction, Schedule
from multint.engines.sections import Executor, Pieces, results_of, run_backward, run_forward
from multint.errors import EngineError

# A first step, one between two others, and a last one; and rows that no number of threads divides, but for 5.
_STEPS, _ROWS = 3, 5

# How far a result may be from autograd's, as a share of its largest number. The catalogued cells of the tests come to
# 2e-6 of this in float64, and to .2 in bfloat16. The rest is for steps that magnify their rounding, as by dividing by
# small numbers. What is wrong is wrong by much more: a gradient without one of its terms, or another step's.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
# What cancels out leaves the rounding of numbers around 1.
_CANCELLED = 1e-3

# Where a step has no numbers for the first draw, as a logarithm has none below 0, it may have some for the second.
_DRAWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda normal: normal,
    lambda normal: 0.1 + 0.8 * normal.abs().clamp(max=1.0),
    lambda normal: 0.1 * normal,
)


class UnprovedError(Exception):
    """What is run gives other numbers than autograd."""


def prove(schedule: Schedule, reverse: bool, executor: Executor) -> None:
    """Raise an UnprovedError unless a section of a schedule gives autograd's numbers, on random ones.

    Raises: EngineError where autograd has no numbers either, so that nothing can be said.

    Args:
        reverse: whether it is the reverse section, and what comes after it, or the forward section.
        executor: what runs it.
    """
    buffers = schedule.buffers
    if reverse:
        names = {f"the gradient of {name}": name for name, parts in schedule.gradients.items() if parts}
    else:
        names = {"the output": schedule.states[0]} | {f"the last {name}": name for name in schedule.states}
    kinds = {buffer.dtype for buffer in buffers.values()}
    kinds.update(*(i.kernel.dtypes() for i in (*schedule.forward, *schedule.reverse) if isinstance(i, Call)))
    # Where numbers are rounded to half precision, others in float64 would choose otherwise what a step compares.
    exact = None if kinds & {torch.float16, torch.bfloat16} else _in_float64(schedule)
    best, most = None, -1.0
    for of in _DRAWS:
        arguments, cotangents = _drawn(schedule, of)
        values = _by_autograd(schedule, exact, reverse, arguments, cotangents)
        expected = [value.to(buffers[name].dtype) for value, name in zip(values, names.values(), strict=True)]
        finite = min((float(v.isfinite().double().mean()) for v in expected if v.numel()), default=1.0)
        if finite > most:
            best, most = (arguments, cotangents, expected), finite
        if finite == 1.0:
            break
    assert best is not None
    if most == 0.0:
        raise EngineError("fused: the step has no finite numbers for the random ones that it is tried with")
    arguments, cotangents, expected = best
    rounding = max(_ROUNDING.get(kind, 0.0) for kind in kinds)
    found = _as_run(schedule, reverse, executor, arguments, cotangents)
    for name, actual, right in zip(names, found, expected, strict=True):
        largest = right.double().nan_to_num(0.0, 0.0, 0.0).abs().max() if right.numel() else 0.0
        bound = rounding * (float(largest) + _CANCELLED)
        try:
            torch.testing.assert_close(actual.cpu(), right.cpu(), rtol=0, atol=bound, equal_nan=True)
        except AssertionError as error:
            raise UnprovedError(f"{name} is not what autograd gives, up to {bound:.1e}") from error


def _drawn(schedule: Schedule, of: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Random numbers for the arguments of a schedule, and for the gradients of the output and of the last state."""
    generator = torch.Generator().manual_seed(0)
    buffers = schedule.buffers

    def one(name: str, extent: Extent, of: Callable[[Tensor], Tensor]) -> Tensor:
        buffer = replace(buffers[name], extent=extent)
        shape = buffer.sizes(_ROWS, _STEPS)
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        if buffer.dtype == torch.bool:
            numbers = (numbers > 0).double()
        elif not buffer.dtype.is_floating_point:
            numbers = 0 * numbers  # it may be an index
        else:
            # Matrices as layers have them, so that the states keep their size.
            is_matrix = len(shape) == 2 and not buffer.has_rows
            numbers = of(numbers) * (max(1, shape[0]) ** -0.5 if is_matrix else 1.0)
        return numbers.to(buffer.device, buffer.dtype)

    firsts = dict.fromkeys(schedule.states, Extent.NOW)
    arguments = {name: one(name, firsts.get(name, buffers[name].extent), of) for name in schedule.arguments}
    kinds = [(schedule.states[0], Extent.EACH), *firsts.items()]
    cotangents = [
        one(name, extent, _DRAWS[0]) if buffers[name].dtype.is_floating_point else None for name, extent in kinds
    ]
    return arguments, cotangents


def _by_autograd(
    schedule: Schedule,
    exact: Schedule | None,
    reverse: bool,
    arguments: dict[str, Tensor],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """What a section is to give: the output and the last state, or the gradients of the arguments that have one."""

    def wide(value: Tensor) -> Tensor:
        value = value.cpu() if exact else value
        return value.double() if exact and value.is_floating_point() else value

    wanted = [name for name, parts in schedule.gradients.items() if parts] if reverse else []
    leaves = {name: wide(value).detach().requires_grad_(name in wanted) for name, value in arguments.items()}
    if not reverse:
        return by_autograd.replay(exact or schedule, leaves, _STEPS)
    given = [None if cotangent is None else wide(cotangent) for cotangent in cotangents]
    found = by_autograd.gradients(exact or schedule, leaves, given, _STEPS)
    return [found.get(name, torch.zeros_like(leaves[name])) for name in wanted]


def _as_run(
    schedule: Schedule,
    reverse: bool,
    executor: Executor,
    arguments: dict[str, Tensor],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """What a section gives."""
    with torch.no_grad():
        forward = Pieces(schedule, False, eager=True) if reverse else executor
        memory = run_forward(schedule, forward, arguments, _STEPS, _ROWS)
        if not reverse:
            return results_of(schedule, memory, _STEPS)
        memory = arguments | {name: memory[name] for name in schedule.kept}
        return list(run_backward(schedule, executor, memory, cotangents, _STEPS, _ROWS).values())


def _in_float64(schedule: Schedule) -> Schedule:
    """What is before the reverse section, on the CPU and with float64 in place of all floating-point numbers."""
    entry, forward = ([*map(_widened, section)] for section in (schedule.entry, schedule.forward))
    return replace(schedule, entry=entry, forward=forward)


def _widened(instruction: Instruction) -> Instruction:
    if not isinstance(instruction, Call):
        return instruction
    graph = fx.Graph()
    graph.output(graph.graph_copy(instruction.kernel.module.graph, {}))
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _widened_argument)
    kernel = copy.copy(instruction.kernel)
    kernel.module = fx.GraphModule(torch.nn.Module(), graph)
    return replace(instruction, kernel=kernel)


def _widened_argument(argument: Any) -> Any:
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument
