"""Composite operations in terms of plainer ones: first the products of a step, then all that C++ has no rule for.

A dimension that has the rows is known by its size, which is the open symbol or a multiple of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multint.engines import convolutions, private
from multint.engines.private import row_dimensions, rows_in

aten: Any = torch.ops.aten


# ---- Products. What a plan takes out of the loop, or makes a stage, is `mm` of rows with a matrix of parameters.


def _mm(x: Tensor, y: Tensor) -> Any:
    if row_dimensions(y) == [1] and not row_dimensions(x):
        return y.t().mm(x.t()).t()
    if row_dimensions(x) == [0] and not row_dimensions(y) and rows_in(x.shape[0]) > 1:
        # Sets of vectors. Each row's are a product of its own, or no row could be told any more.
        sets = x.unflatten(0, (-1, rows_in(x.shape[0])))
        return sets.bmm(y.expand(sets.shape[0], -1, -1)).flatten(0, 1)
    return NotImplemented


# Products with so many matrices are one of the loop's each; more of them are small, and computed where each row is.
_MOST_MATRICES = 16


def _bmm(x: Tensor, y: Tensor) -> Any:
    """Of as many matrices of parameters: einsum puts the rows into the second dimension, and `mm` into the first."""
    if not row_dimensions(x) and row_dimensions(y) == [2]:
        return y.mT.bmm(x.mT).mT
    if row_dimensions(x) == [1] and not row_dimensions(y):
        if x.shape[0] <= _MOST_MATRICES:
            return torch.stack([x[k].mm(y[k]) for k in range(x.shape[0])])
        return (x.transpose(0, 1).unsqueeze(-1) * y).sum(2).transpose(0, 1)
    return NotImplemented


def _mv(x: Tensor, v: Tensor) -> Tensor:
    return x.mm(v.unsqueeze(1)).squeeze(1)


def _with_sum(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product and what is added to it apart, so that the sum joins the pointwise code."""

    def decomposition(x: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        y = product(left, right)
        y = y if alpha == 1 else alpha * y
        return y if beta == 0 else y + (x if beta == 1 else beta * x)

    return decomposition


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *settings: list[int]) -> Tensor:
    """Σ a ⊙ b ⊙ c over some dimensions of what the three are spread to, which `nn.Bilinear` is."""
    *spread, summed = settings[:4]
    count = a.ndim + len(spread[0])
    letters = ["".join(chr(ord("a") + d) for d in range(count) if d not in new) for new in spread]
    result = "".join(chr(ord("a") + d) for d in range(count) if d not in summed)
    return torch.einsum(f"{','.join(letters)}->{result}", a, b, c)


def products() -> dict[Any, Callable[..., Any]]:
    """For the trace of a step."""
    return {
        aten.mm.default: _mm,
        aten.bmm.default: _bmm,
        aten.mv.default: _mv,
        aten.addmm.default: _with_sum(torch.mm),
        aten.baddbmm.default: _with_sum(torch.bmm),
        aten.addmv.default: _with_sum(torch.mv),
        aten._trilinear.default: _trilinear,
        **private.decompositions(["_scaled_dot_product_flash_attention_for_cpu"]),
    }


# ---- All else, for the C++ of a piece.

# By the decompositions that torch has for them.
COMPOSITE = """
    addcdiv addcmul celu diag_embed elu elu_backward fill frac gelu gelu_backward glu glu_backward
    hardsigmoid hardsigmoid_backward hardswish hardswish_backward hardtanh hardtanh_backward leaky_relu
    leaky_relu_backward lerp linalg_vector_norm log_sigmoid_backward log_sigmoid_forward _log_softmax
    _log_softmax_backward_data logaddexp logsumexp masked_fill mish native_group_norm native_group_norm_backward
    native_layer_norm native_layer_norm_backward nan_to_num new_full new_ones new_zeros ones_like _prelu_kernel
    _prelu_kernel_backward rsub _safe_softmax select_backward sigmoid_backward silu silu_backward slice_backward
    _softmax _softmax_backward_data softplus softplus_backward square tanh_backward threshold_backward tril
    triu unsafe_split  zeros_like
"""


@functools.cache
def plainer() -> dict[Any, Callable[..., Any]]:
    """For the operations that are composed of those that C++ has rules for."""
    found = private.decompositions(COMPOSITE.split())
    for name, value in _AT_NAN.items():
        derivative = getattr(aten, name).default
        found[derivative] = _with_nan(found[derivative], value)
    return found | {
        aten.sum.dim_IntList: _sum,
        aten.sum.default: _sum,
        aten.mean.dim: _mean,
        aten.mean.default: _mean,
        aten.var_mean.correction: _var_mean,
        aten.var.correction: lambda *args, **kwargs: _var_mean(*args, **kwargs)[0],
        aten.std.correction: lambda *args, **kwargs: _var_mean(*args, **kwargs)[0].sqrt(),
        aten.argmax.default: _argmax,
        aten.argmin.default: lambda x, *args: _argmax(-x, *args),
        aten.max.dim: lambda x, dim, keepdim=False: (x.amax(dim, keepdim), _argmax(x, dim, keepdim)),
        aten.min.dim: lambda x, dim, keepdim=False: (x.amin(dim, keepdim), _argmax(-x, dim, keepdim)),
        aten.div.Tensor_mode: _rounded_quotient,
        aten.div.Scalar_mode: _rounded_quotient,
        aten.floor_divide.default: lambda x, y: _rounded_quotient(x, y, rounding_mode="floor"),
        aten.floor_divide.Scalar: lambda x, y: _rounded_quotient(x, y, rounding_mode="floor"),
        aten.any.dim: _any,
        aten.all.dim: _all,
        aten.baddbmm.default: _with_sum(torch.bmm),
        aten.stack.default: lambda xs, dim=0: torch.cat([x.unsqueeze(dim) for x in xs], dim),
        aten.unbind.int: lambda x, dim=0: tuple(x.select(dim, i) for i in range(x.shape[dim])),
        aten.roll.default: _roll,
        aten.repeat.default: _repeat,
        aten.index_select.default: lambda x, dim, index: x[(*[slice(None)] * (dim % x.ndim), index)],
        aten.scatter.value: _scatter_value,
        aten.scatter.src: _scatter,
        aten.scatter_add.default: _scatter_add,
        aten.constant_pad_nd.default: _pad,
        aten.fill.Tensor: lambda x, value: value.to(x.dtype).expand(x.shape),
        aten.select_scatter.default: _select_scatter,
        aten.unfold_backward.default: _unfold_backward,
        aten.diagonal_backward.default: _diagonal_backward,
        aten._native_batch_norm_legit_no_training.default: _batch_norm,
        aten.convolution.default: convolutions.convolution,
        aten.convolution_backward.default: convolutions.convolution_backward,
        aten.avg_pool2d.default: convolutions.average,
        aten.avg_pool2d_backward.default: convolutions.average_backward,
    }


# Torch's own operations give these where whole vectors are computed. Its decompositions give what it gives for the few
# numbers at the end of a tensor, where an exploded activation gets the gradient of a large one.
_AT_NAN = {"elu_backward": math.nan, "hardswish_backward": math.nan, "hardtanh_backward": 0.0}


def _with_nan(derivative: Callable[..., Tensor], value: float) -> Callable[..., Tensor]:
    """The derivative with this value where the activation's argument is NaN."""

    def decomposition(*args: Any) -> Tensor:
        _, x = (arg for arg in args if isinstance(arg, Tensor))
        return torch.where(x == x, derivative(*args), value)

    return decomposition


def _dims(x: Tensor, dim: Any) -> list[int]:
    """The dimensions that a reduction is over; all of them where none is named."""
    some = [dim] if isinstance(dim, int) else list(dim or range(x.ndim))
    return [d % x.ndim for d in some]


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Within each row first: what is left is a sum over the rows and over nothing else."""
    dims = _dims(x, dim)
    rows = [d for d in row_dimensions(x) if d in dims]
    if dtype not in (None, x.dtype):
        return x.to(dtype).sum(dims, keepdim)
    if rows and rows_in(x.shape[rows[0]]) > 1:
        x = x.unflatten(rows[0], (-1, rows_in(x.shape[rows[0]])))
        return x.sum([rows[0], *(d + (d >= rows[0]) for d in dims)], keepdim).squeeze(rows if keepdim else [])
    if rows and len(rows) < len(dims):
        y = x.sum([d for d in dims if d not in rows], True).sum(rows, True)
        return y if keepdim else y.squeeze(dims)
    return NotImplemented if dim else x.sum(dims, keepdim)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    dims = _dims(x, dim)
    return x.sum(dims, keepdim, dtype=dtype) / math.prod(x.shape[d] for d in dims)


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    dims = _dims(x, dim)
    mean = _mean(x, dims, keepdim=True)
    count = math.prod(x.shape[d] for d in dims) - (1 if correction is None else correction)
    return (x - mean).square().sum(dims, keepdim) / count, mean if keepdim else mean.squeeze(dims)


def _rounded_quotient(x: Tensor, y: Any, *, rounding_mode: str | None) -> Any:
    """As torch rounds it down: so that it goes with the remainder, which is exact."""
    if not x.is_floating_point():
        return NotImplemented
    exact = x / y
    if rounding_mode != "floor":
        return exact.trunc() if rounding_mode else exact
    if isinstance(y, Tensor) or y == 0:
        return NotImplemented
    rest = x.fmod(y)
    quotient = (x - rest) / y
    quotient = torch.where((rest != 0).logical_and((rest < 0) != (y < 0)), quotient - 1.0, quotient)
    down = quotient.floor()
    down = torch.where(quotient - down > 0.5, down + 1.0, down)
    return torch.where(quotient != 0, down, torch.copysign(torch.zeros_like(exact), exact))


def _any(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return torch.where(x, 1.0, 0.0).amax(dim, keepdim) > 0


def _all(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return _any(x.logical_not(), dim, keepdim).logical_not()


def _argmax(x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """The first place of the largest number, or of a NaN."""
    if dim is None:
        return NotImplemented
    places = _places(x, dim, x.dtype)
    is_there = (x == x.amax(dim, True)).logical_or(x != x)
    return torch.where(is_there, places, x.shape[dim]).amin(dim, keepdim).to(torch.int64)


def _places(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The numbers of the places in a dimension, along it."""
    places = torch.arange(x.shape[dim], dtype=dtype, device=x.device)
    return places.view(-1, *[1] * (x.ndim - 1 - dim % x.ndim))


def _hits(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """For each place of x, and behind that dimension for each index: whether the index says that place."""
    return index.unsqueeze(dim % x.ndim) == _places(x, dim, index.dtype).unsqueeze(dim % x.ndim - x.ndim)


def _scatter_value(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    return torch.where(_hits(x, dim, index).any(dim % x.ndim + 1), value, x)


def _scatter(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    if index.shape[dim] != 1:  # of several to one place the last would stay
        return NotImplemented
    return torch.where(_hits(x, dim, index).squeeze(dim % x.ndim + 1), source, x)


def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    dim %= x.ndim
    return x + torch.where(_hits(x, dim, index), source.unsqueeze(dim), 0.0).sum(dim + 1)


def _roll(x: Tensor, shifts: Any, dims: Any = ()) -> Any:
    if not dims:
        return NotImplemented
    for shift, dim in zip(shifts, dims, strict=True):
        first = -shift % x.shape[dim]
        x = torch.cat([x.narrow(dim, first, x.shape[dim] - first), x.narrow(dim, 0, first)], dim)
    return x


def _repeat(x: Tensor, repeats: Any) -> Tensor:
    x = x.view(*[1] * (len(repeats) - x.ndim), *x.shape)
    for dim, times in enumerate(repeats):
        x = x if isinstance(times, int) and times == 1 else torch.cat([x] * times, dim)
    return x


def _pad(x: Tensor, pad: Any, value: Any = 0) -> Tensor:
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = x.ndim - 1 - i
        first, last = max(0, -before), x.shape[dim] - max(0, -after)
        x = x.narrow(dim, first, last - first)
        shape = list(x.shape)
        around = [x.new_full([*shape[:dim], max(0, n), *shape[dim + 1 :]], value) for n in (before, after)]
        x = torch.cat([around[0], x, around[1]], dim)
    return x


def _select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    index %= x.shape[dim]
    return torch.slice_scatter(x, source.unsqueeze(dim), dim, index, index + 1)


def _unfold_backward(d: Tensor, sizes: Any, dim: int, size: int, step: int) -> Tensor:
    """Each place of a window gives to every `step`-th number."""
    dim %= len(sizes)
    zeros, parts = d.new_zeros(sizes), []
    for i in range(size):
        last = i + step * (d.shape[dim] - 1) + 1
        parts.append(torch.slice_scatter(zeros, d.select(-1, i), dim, i, last, step))
    return functools.reduce(torch.add, parts)


def _diagonal_backward(d: Tensor, sizes: Any, offset: int, dim1: int, dim2: int) -> Any:
    x = torch.diag_embed(d, offset, dim1, dim2)
    return x if tuple(x.shape[1:]) == tuple(sizes[1:]) else NotImplemented


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    def along(channels: Tensor) -> Tensor:
        return channels.view(-1, *[1] * (x.ndim - 2))

    y = (x - along(mean)) * along((variance + eps).rsqrt())
    y = y if weight is None else y * along(weight)
    return (y if bias is None else y + along(bias)), x.new_zeros(0), x.new_zeros(0)
