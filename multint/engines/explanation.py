"""How a scan runs, as a text to be read; and its compilation ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multint.engines.checks import (
    State,
    Steppable,
    Streams,
    at_a_step,
    check,
    first_state_differs,
    not_worth_it,
    size_of,
    too_small_for_pieces,
    why_not_fused,
)
from multint.engines.dispatch import scan
from multint.engines.failures import FailedError
from multint.engines.tables import record_of
from multint.errors import EngineError, OptionError, in_a_line

if TYPE_CHECKING:
    from multint.engines.program import Program


def explain(
    cell: Steppable[State],
    xs: Streams | None = None,  # (T, B, X), or several streams by name
    state: State | None = None,
    engine: str = "auto",
) -> Explanation:
    """Say how `scan(cell, xs, state, engine)` would run, and by what plan. Nothing is run for that.

    Without `xs`, say how the cell's last scan by "auto" or "fused" ran. `Recurrent.explain` does so for a layer.

    Raises: OptionError and ShapeError as `scan` does; OptionError for a cell that has not run.
    """
    if xs is None:
        last = record_of(cell).last if isinstance(cell, nn.Module) else None
        if last is None:
            raise OptionError("explain: this cell or layer has not run by 'auto' or 'fused'")
        program = None if last.program is None else last.program()
        reason = program.failure if program else last.reason
        return Explanation("loop" if reason else "fused", reason, program, last.size)
    if state is None:
        state = cell.initial_state(size_of(xs)[1])  # type: ignore[attr-defined]
    check(cell, xs, state, engine)
    if engine == "loop":
        return Explanation("loop", "asked for")
    from multint.engines.program import program_of

    program = None
    try:
        reason = why_not_fused(cell, xs, state)
        if not reason:
            program, _ = program_of(cell, at_a_step(xs), state, by_name=True)  # type: ignore[arg-type]
            reason = first_state_differs(program, state)
            if engine == "auto":
                reason = reason or not_worth_it(cell, xs) or too_small_for_pieces(cell, xs, program)  # type: ignore[arg-type]
    except Exception as error:
        reason = str(error) if isinstance(error, EngineError | FailedError) else f"fused: {in_a_line(error)}"
    return Explanation("loop" if reason else "fused", reason, program, size_of(xs))


@dataclass(frozen=True)
class Explanation:
    """How a scan runs: `engine`; where that is the loop, the `reason`; the `plan` of the step. Printed, all three."""

    engine: str
    reason: str
    _program: Program | None = None
    _size: tuple[int, int] = (0, 0)

    @property
    def plan(self) -> str:
        """The schedule of the step and the memory that it keeps; empty where the step was not traced."""
        if self._program is None:
            return ""
        from multint.engines.run import steps_at_a_time

        (steps, rows), schedule = self._size, self._program.last or self._program.whole()
        chunk = steps_at_a_time(self._program, steps, rows)
        kept = chunk * rows * schedule.bytes_per_row / 2**20
        lines = [schedule.show(steps, rows), f"kept for the backward pass: {kept:.1f} MiB"]
        for title, section in (("forward", schedule.forward), ("backward", schedule.reverse)):
            if section:
                lines.append(f"run {title} by {self._program.how(schedule, section is schedule.reverse)}")
        if chunk < steps:
            lines.append(f"more would not fit the budget: {-(-steps // chunk)} parts of {chunk} steps, each run twice")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(line for line in (f"engine: {self.engine}", self.reason, self.plan) if line)


def precompile(
    cell: Steppable[State],
    xs: Streams,  # (T, B, X), or several streams by name, of any T
    state: State | None = None,
) -> Explanation:
    """Compile what scans of such inputs by "fused" run, in both passes, and say how they run.

    Whatever T and B are later. Native loops are kept for the user's other processes too, in ~/.cache/multint/loops or
    the folder that MULTINT_CACHE_DIR names, so that a machine can be made ready before it is needed. The step is run;
    no gradient is left in the parameters.

    Raises: as `scan` does by "fused".
    """
    xs = {name: x[:1] for name, x in xs.items()} if isinstance(xs, dict) else xs[:1]
    if state is None:
        if not hasattr(cell, "initial_state"):
            raise OptionError(f"precompile: {type(cell).__name__} has no initial_state; a layer has its own precompile")
        state = cell.initial_state(size_of(xs)[1])
    run_both_passes(lambda: scan(cell, xs, state, "fused"), cell)  # type: ignore[arg-type]
    return explain(cell)


def run_both_passes(call: Callable[[], tuple[Any, Any]], module: nn.Module) -> None:
    """Call for an output and a state, without gradients and with those of a module's parameters, which are dropped."""
    with torch.no_grad():
        call()
    with torch.enable_grad():
        output, final = call()
        results = [value for value in (output, *final) if value.requires_grad]
        leaves = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if results and leaves:
            torch.autograd.grad(results, leaves, list(map(torch.ones_like, results)), allow_unused=True)
