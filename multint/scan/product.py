"""Products with a matrix, by the faster of the libraries that torch has for them."""

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
    return _Product.apply(left, right)  # type: ignore[no-untyped-call]


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product (N, I) @ (I, O), outside autograd."""
    if _by_onednn(right, len(left)):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
        return result
    return left @ right


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
        return (
            product(d_result, right.t()) if ctx.needs_input_grad[0] else None,
            product(left.t(), d_result) if ctx.needs_input_grad[1] else None,
        )


def _by_onednn(right: Tensor, rows: int) -> bool:
    """oneDNN picks its kernels by what the processor can do; MKL, which `mm` calls, by who made it."""
    if right.device.type != "cpu" or rows * right.numel() < _LARGE or not torch.backends.mkldnn.enabled:
        return False
    if right.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return right.dtype == torch.float32 and torch.backends.mkldnn.is_available()
