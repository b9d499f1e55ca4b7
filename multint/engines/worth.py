"""Whether it pays to compile for a scan, which is what `auto` asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multint.engines.checks import Streams, is_listed, size_of
from multint.engines.native.machine import has_compiler
from multint.engines.tables import record_of

if TYPE_CHECKING:
    from multint.engines.program import Program

# Compiling a native loop takes about 5 s, and what it saves is mostly a step's overhead: .14 to .41 ms a step for both
# passes at H ≤ 128, with two threads (`python -m experiments bench --quick --rounds 7`). So `auto` compiles at once
# where a call is large, which repays it within some hundred calls or a thousand, and what is smaller after so many
# steps, which took the loop about as long as compiling.
_WORTH_COMPILING = 10**7  # multiply-adds of a forward pass
_STEPS_BEFORE = 20_000
# Where each piece is compiled by Inductor, which takes ten times as long; and where there is no compiler, so that
# pieces run op by op, which is slower than the loop at small sizes.
_TIMES_MORE_IN_PIECES, _TIMES_MORE_WITHOUT_COMPILER = 10, 100


def not_worth_it(cell: Any, xs: Streams) -> str:
    """Why `auto` does not try `fused`; empty where it does."""
    if size_of(xs)[0] == 1:
        return "auto: one step is no loop"
    if not isinstance(cell, nn.Module) or not is_listed(cell):
        return ""  # which is a refusal of `fused` itself
    kinds = {(tensor.device.type, tensor.dtype) for tensor in cell.parameters()}
    if not kinds <= {("cpu", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        return f"auto: fused is measured in float32, float64 and bfloat16 on CPUs only, and this is {found}"
    worth = _WORTH_COMPILING * _TIMES_MORE_WITHOUT_COMPILER
    if _work(cell, xs) < worth and not has_compiler():
        return f"auto: there is no C++ compiler, and without one the loop is faster below {worth:.0e} multiply-adds"
    half = torch.is_autocast_enabled("cpu") or ("cpu", torch.bfloat16) in kinds
    return _too_small(cell, xs, half or record_of(cell).in_pieces)


def _too_small(cell: nn.Module, xs: Streams, in_pieces: bool) -> str:
    """Why it does not pay to compile for a scan, or not yet; empty where it does."""
    work, times = _work(cell, xs), _TIMES_MORE_IN_PIECES if in_pieces else 1
    if work >= times * _WORTH_COMPILING or record_of(cell).stepped >= times * _STEPS_BEFORE:
        return ""
    what = "its pieces" if in_pieces else "it"
    return f"auto: at {work:.1e} multiply-adds, compiling {what} pays after {times * _STEPS_BEFORE:,} steps by the loop"


def too_small_for_pieces(cell: nn.Module, xs: Streams, program: Program) -> str:
    """Why it does not pay to compile a program whose pieces are compiled one by one; empty where it does."""
    if program.is_native():
        return ""
    if any(buffer.dtype == torch.float64 for buffer in program.forward.buffers.values()):
        return "auto: in float64 fused is measured by native loops only, and this step has none"
    record_of(cell).in_pieces = True  # so that the next call knows it without the program
    return _too_small(cell, xs, in_pieces=True)


def _work(cell: nn.Module, xs: Streams) -> int:
    """About the multiply-adds of a forward pass."""
    steps, rows = size_of(xs)
    return steps * rows * sum(parameter.numel() for parameter in cell.parameters())
