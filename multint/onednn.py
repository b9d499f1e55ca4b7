"""What the products need of torch that torch does not promise: oneDNN's operators, and what these do not follow.

Each part is tried at its first use. Where it is missing or wrong, the answer is for good that products are plain ones.
"""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def linear(
    left: Tensor,  # (N, I)
    weight: Tensor,  # (O, I), in any order or from `reorder`
) -> Tensor:  # (N, O)
    """`left @ weight.t()` by oneDNN, which has no derivative; only for a dtype that `multiplies` says yes to."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, weight, None, "none", [], "")
    return result


def reorder(
    weight: Tensor,  # (O, I)
    rows: int,
) -> Tensor:
    """The weight in oneDNN's own order, for calls of `linear` with that many rows and for nothing else."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return result


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether `linear` and `reorder` are there on this processor and give `mm`'s numbers in that dtype.

    What the operators say of themselves is not enough: where oneDNN is held to an older instruction set
    (`ONEDNN_MAX_CPU_ISA`), torch may still report bf16 as supported, and the product raises.
    """
    # The first product may be one that is traced, under autocast or within a transform, all of which would change the
    # trial or record it. They are the caller's thread's alone.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_agrees_with_mm, dtype).result()


@cache
def mkl_is_at_home() -> bool:
    """Whether `mm` is MKL's on a processor of MKL's maker: there it is faster than `linear`, by 10 to 30 %."""
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in described


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
        expected = left @ right
        weights = right.t(), right.t().contiguous(), reorder(right.t(), len(left))
        return all(torch.equal(linear(left, weight), expected) for weight in weights)
    except Exception:
        return False  # of any kind: what is not promised can fail in any way


def only_mm_is_known() -> bool:
    """Whether a transform of `torch.func` or forward differentiation is active, whose rules are for `mm` alone.

    A torch that no longer tells is taken to say yes: the plain product is always right.
    """
    try:
        return bool(torch._C._are_functorch_transforms_active()) or torch.autograd.forward_ad._current_level >= 0
    except AttributeError:
        return True
