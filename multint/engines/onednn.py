"""Many products with one matrix, by oneDNN where torch has it: the matrix is brought into oneDNN's own order once.

The operators for this are private to torch. They are tried at the first use; where one is missing or wrong, products
are plain ones from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

# Multiply-adds of a product from which oneDNN, which takes longer to call, is faster than the BLAS; and the number of
# products with one matrix from which it pays to bring the matrix in order first. Both by measurement.
_LARGE = 2**21
_MANY = 8


def prepared_product(
    right: Tensor,  # (I, O)
    rows: int,
    times: int,
) -> Callable[[Tensor], Tensor]:
    """A function (N, I) → (N, O), `left @ right` outside autograd, made ready for that many calls with N = `rows`.

    It may hold a copy of the matrix: what is written to `right` later may or may not reach it.
    """
    if times < _MANY or not _is_worth_it(right, rows):
        dense = right.contiguous()
        return lambda left: torch.mm(left, dense)
    weight = _reorder(right.t(), rows)
    return lambda left: _linear(left, weight)


def _is_worth_it(right: Tensor, rows: int) -> bool:
    # For each number of rows, and in each thread, torch keeps a program of oneDNN's for good, of .5 to 2 MiB. So few
    # numbers may have one: the powers of two, as most batches are.
    if rows & (rows - 1) or rows * right.numel() < _LARGE:
        return False
    if right.device.type != "cpu" or right.dtype not in (torch.float32, torch.bfloat16):
        return False
    return bool(torch.backends.mkldnn.enabled) and _multiplies(right.dtype)


def _linear(
    left: Tensor,  # (N, I)
    weight: Tensor,  # (O, I), from `_reorder`
) -> Tensor:  # (N, O)
    """`left @ weight.t()`, which has no derivative."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, weight, None, "none", [], "")
    return result


def _reorder(
    weight: Tensor,  # (O, I)
    rows: int,
) -> Tensor:
    """The weight in oneDNN's own order, for calls of `_linear` with that many rows and for nothing else."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return result


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the operators are there on this processor and give `mm`'s numbers in that dtype.

    What they say of themselves is not enough: where oneDNN is held to an older instruction set
    (`ONEDNN_MAX_CPU_ISA`), torch may still report bf16 as supported, and the product raises.
    """
    # Autocast, a transform or a trace around the caller would change the trial or record it. They are the caller's
    # thread's alone.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_agrees_with_mm, dtype).result()


def _agrees_with_mm(dtype: torch.dtype) -> bool:
    try:
        if not torch.backends.mkldnn.is_available():
            return False
        # Without the instructions, bf16 may be there and slow.
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        # Small integers, which every order of summation and every precision gives exactly; no random numbers, since
        # the user's would change. The sizes differ from each other, so that no wrong order passes for the right one.
        left = torch.arange(24.0, device="cpu").remainder(7).sub(3).reshape(4, 6).to(dtype)
        right = torch.arange(30.0, device="cpu").remainder(11).sub(5).reshape(6, 5).to(dtype)
        return torch.equal(_linear(left, _reorder(right.t(), len(left))), left @ right)
    except Exception:
        return False  # of any kind: what is not promised can fail in any way
