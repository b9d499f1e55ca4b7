"""Matrix products, by the faster of the libraries that torch has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Multiply-adds from which oneDNN, which takes longer to call, is faster than the BLAS; and the number of products with
# one matrix from which it pays to bring the matrix into oneDNN's own order first. Both by measurement.
_LARGE = 2**21
_MANY = 8


def product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product (N, I) @ (I, O), differentiable any number of times."""
    fits = left.dtype == right.dtype and left.shape[1] == right.shape[0]  # else let mm say so
    if torch.compiler.is_compiling() or not fits or _by_rules_of_mm(left) or not _by_onednn(right, len(left)):
        return left @ right
    return _Product.apply(left, right)  # type: ignore[no-untyped-call]


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product (N, I) @ (I, O), outside autograd."""
    if _by_onednn(right, len(left)):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
        return result
    return left @ right


def transposed_multiply(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product (N, I)ᵀ @ (N, O), outside autograd: the gradient of a matrix."""
    # The first factor of a product is copied into its order, so the smaller matrix comes first.
    return multiply(left.t(), right) if left.numel() <= right.numel() else multiply(right.t(), left).t()


def multiplier(right: Tensor, rows: int, times: int) -> Callable[[Tensor], Tensor]:
    """A function (N, I) → (N, I) @ (I, O), outside autograd, made ready for that many calls with N rows."""
    if not _by_onednn(right, rows):
        dense = right.contiguous()
        return lambda left: torch.mm(left, dense)
    linear = torch.ops.mkldnn._linear_pointwise.default
    weight = right.t()
    if times >= _MANY:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda left: linear(left, weight, None, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return multiply(left, right)

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> Any:
        left, right = ctx.saved_tensors
        d_left = product(d_result, right.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_left, None
        if torch.is_grad_enabled():
            return d_left, product(left.t(), d_result)
        return d_left, transposed_multiply(left, d_result)


def _by_rules_of_mm(left: Tensor) -> bool:
    """Whether something is active that knows `mm` and not our own function."""
    return (
        torch.is_autocast_enabled(left.device.type)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _by_onednn(right: Tensor, rows: int) -> bool:
    """oneDNN picks its kernels by what the processor can do; MKL, which `mm` calls, by who made it."""
    if right.device.type != "cpu" or rows * right.numel() < _LARGE or not torch.backends.mkldnn.enabled:
        return False
    if right.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return right.dtype == torch.float32 and torch.backends.mkldnn.is_available()
