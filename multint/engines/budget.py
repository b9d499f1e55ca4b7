"""A bound on the memory that a scan keeps for its backward pass: beyond it, the scan is cut in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multint.engines.program import Program
    from multint.engines.schedule import At

# Bytes of streams, products and states. A scan that needs more is cut in time, and the backward pass computes each
# part again.
MEMORY_BUDGET = 2**30


def steps_at_a_time(program: Program, steps: int, rows: int) -> int:
    """How many steps' buffers fit the memory budget."""
    schedule = program.whole() if torch.is_grad_enabled() else program.forward
    return max(1, min(steps, MEMORY_BUDGET // max(1, rows * schedule.bytes_per_row)))


def run_in_parts(
    program: Program, known: dict[At, Tensor], inputs: Sequence[Tensor], state: Sequence[Tensor], asked: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run a program over all steps, in as many parts as the memory budget asks for."""
    from multint.engines.executor import run

    steps, rows = inputs[0].shape[:2]
    chunk = steps_at_a_time(program, steps, rows)
    if chunk == steps:
        return run(program, known, inputs, state, asked)
    from torch.utils.checkpoint import checkpoint

    outputs, fields = [], list(state)
    for parts in zip(*(leaf.split(chunk) for leaf in inputs), strict=True):
        output, fields = checkpoint(
            run, program, known, list(parts), fields, asked, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(output)
    return torch.cat(outputs), fields
