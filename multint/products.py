"""Matrix products, by the faster of the libraries that torch has for them.

`differentiable_product` stands for `@` in a module. The others are for the inside of an `autograd.Function`, where
nothing is recorded: `untracked_product`, `untracked_transposed_product` (the gradient of a matrix), each of which can
write into memory that is there, and `prepared_product`, for many products with one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multint import onednn

# Multiply-adds from which oneDNN, which takes longer to call, is faster than the BLAS; and the number of products with
# one matrix from which it pays to bring the matrix into oneDNN's own order first. Both by measurement.
_LARGE = 2**21
_MANY = 8


def differentiable_product(
    left: Tensor,  # (N, I)
    right: Tensor,  # (I, O)
) -> Tensor:  # (N, O)
    """`left @ right`, differentiable any number of times."""
    fits = left.dtype == right.dtype and left.shape[1] == right.shape[0]  # else let mm say so
    # The number of rows is asked for last: where a step is read, the answer must not fix it.
    if torch.compiler.is_compiling() or not fits or _by_rules_of_mm(left) or not _by_onednn(right, len(left)):
        return left @ right
    if _by_mkl(left):
        return left @ right
    return _Product.apply(left, right)  # type: ignore[no-untyped-call]


def untracked_product(
    left: Tensor,  # (N, I)
    right: Tensor,  # (I, O)
    out: Tensor | None = None,  # (N, O)
) -> Tensor:  # (N, O)
    """`left @ right`, outside autograd; written to `out` where that is given."""
    if _by_onednn(right, len(left)) and not _by_mkl(left):
        result = onednn.linear(left, right.t())
        return result if out is None else out.copy_(result)
    return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)


def untracked_transposed_product(
    left: Tensor,  # (N, I)
    right: Tensor,  # (N, O)
    total: Tensor | None = None,  # (I, O)
) -> Tensor:  # (I, O)
    """`left.t() @ right`, outside autograd: the gradient of a matrix from what it multiplied and the cotangent.

    Added to `total` where that is given.
    """
    # The first factor of a product is copied into its order, so the smaller matrix comes first.
    if left.numel() > right.numel():
        return untracked_transposed_product(right, left, None if total is None else total.t()).t()
    if total is None:
        return untracked_product(left.t(), right)
    if _by_onednn(right, left.shape[1]) and not _by_mkl(left):
        return total.add_(untracked_product(left.t(), right))
    return total.addmm_(left.t(), right)


def prepared_product(
    right: Tensor,  # (I, O)
    rows: int,
    times: int,
) -> Callable[[Tensor], Tensor]:
    """A function (N, I) → (N, O), `left @ right` outside autograd, made ready for that many calls with N = `rows`.

    It may hold a copy of the matrix: what is written to `right` later may or may not reach it.
    """
    if not _by_onednn(right, rows):
        dense = right.contiguous()
        return lambda left: torch.mm(left, dense)
    weight = onednn.reorder(right.t(), rows) if times >= _MANY else right.t()
    return lambda left: onednn.linear(left, weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return untracked_product(left, right)

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> Any:
        left, right = ctx.saved_tensors
        d_left = differentiable_product(d_result, right.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_left, None
        # The second derivative is asked for where autograd records the backward pass.
        if torch.is_grad_enabled():
            return d_left, differentiable_product(left.t(), d_result)
        return d_left, untracked_transposed_product(left, d_result)


def _by_rules_of_mm(left: Tensor) -> bool:
    """Whether something is active that knows `mm` and not our own function."""
    if left.device.type == "meta":  # which autocast cannot be asked about
        return True
    return torch.is_autocast_enabled(left.device.type) or onednn.only_mm_is_known()


def _by_mkl(left: Tensor) -> bool:
    """Whether `mm` is the faster for a single product, in no order made ready for it."""
    return left.dtype == torch.float32 and onednn.mkl_is_at_home()


def _by_onednn(right: Tensor, rows: int) -> bool:
    """oneDNN picks its kernels by what the processor can do; MKL, which `mm` calls, by who made it."""
    if right.device.type != "cpu" or rows * right.numel() < _LARGE or not torch.backends.mkldnn.enabled:
        return False
    return right.dtype in (torch.float32, torch.bfloat16) and onednn.multiplies(right.dtype)
