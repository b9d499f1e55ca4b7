"""Composite operations in terms of plainer ones: first the products of a step, then all that C++ has no rule for.

A dimension that has the rows is known by its size, which is the open symbol or a multiple of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

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
    """For the trace of a step. Averages are among them so that autograd makes their derivatives of plainer ones."""
    return {
        aten.mm.default: _mm,
        aten.bmm.default: _bmm,
        aten.mv.default: lambda x, v: x.mm(v.unsqueeze(1)).squeeze(1),
        aten.addmm.default: _with_sum(torch.mm),
        aten.baddbmm.default: _with_sum(torch.bmm),
        aten.addmv.default: _with_sum(torch.mv),
        aten._trilinear.default: _trilinear,
        aten.avg_pool2d.default: convolutions.average,
        **private.decompositions(["_scaled_dot_product_flash_attention_for_cpu"]),
    }


# ---- All else, for the C++ of a piece.

# By the decompositions that torch has for them.
COMPOSITE = """
    addcdiv addcmul all any celu diag_embed elu elu_backward embedding fill frac gelu gelu_backward glu glu_backward
    hardsigmoid hardswish hardswish_backward hardtanh hardtanh_backward index_select leaky_relu
    leaky_relu_backward lerp linalg_vector_norm log_sigmoid_backward log_sigmoid_forward _log_softmax
    _log_softmax_backward_data logaddexp logsumexp masked_fill mish nan_to_num _native_batch_norm_legit
    _native_batch_norm_legit_no_training native_group_norm native_group_norm_backward native_layer_norm
    native_layer_norm_backward new_full new_ones new_zeros ones ones_like _prelu_kernel _prelu_kernel_backward rsub
    _safe_softmax select_backward sigmoid_backward silu silu_backward slice_backward _softmax _softmax_backward_data
    softplus softplus_backward tanh_backward threshold_backward tril triu unsafe_split zeros zeros_like
"""


@functools.cache
def plainer() -> dict[Any, Callable[..., Any]]:
    """For the operations that are composed of those that C++ has rules for."""
    found = private.decompositions(COMPOSITE.split())
    del found[aten._native_batch_norm_legit.no_stats]  # of training, where rows see each other
    for name, value in _AT_NAN.items():
        derivative = getattr(aten, name).default
        found[derivative] = _with_nan(found[derivative], value)
    return found | {
        aten.hardsigmoid_backward.default: _hardsigmoid_backward,
        **_SUMS,
        aten.pow.Tensor_Scalar: _power,
        aten.clamp.default: _clamp,
        aten.slice_scatter.default: _slice_scatter,
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
        aten.mm.default: lambda x, y: _product_in_each_row(x.unsqueeze(-2), y).squeeze(-2),
        aten.bmm.default: _product_in_each_row,
        aten.baddbmm.default: _with_sum(torch.bmm),
        aten.stack.default: lambda xs, dim=0: torch.cat([x.unsqueeze(dim) for x in xs], dim),
        aten.roll.default: _roll,
        aten.repeat.default: _repeat,
        aten.scatter.value: _scatter_value,
        aten.scatter.src: _scatter,
        aten.scatter_add.default: _scatter_add,
        aten.constant_pad_nd.default: _pad,
        aten.fill.Tensor: lambda x, value: value.to(x.dtype).expand(x.shape),
        aten.select_scatter.default: lambda x, source, dim, place: torch.slice_scatter(
            x, source.unsqueeze(dim), dim, place % x.shape[dim], place % x.shape[dim] + 1
        ),
        aten.unfold_backward.default: _unfold_backward,
        aten.diagonal_backward.default: _diagonal_backward,
        aten.convolution.default: convolutions.convolution,
        aten.convolution_backward.default: convolutions.convolution_backward,
    }


def is_composite(node: fx.Node) -> bool:
    """Whether `plainer` may have plainer operations for one of a graph, of whose arguments the graph tells the kind."""
    is_known = all("val" in given.meta for given in node.all_input_nodes)
    return node.target in plainer() and is_known and (bool(node.kwargs) or node.target not in _SUMS)


# Torch's own operations give these where whole vectors are computed. Its decompositions give what it gives for the few
# numbers at the end of a tensor, where an exploded activation gets the gradient of a large one.
_AT_NAN = {"elu_backward": math.nan, "hardswish_backward": math.nan, "hardtanh_backward": 0.0}


def _with_nan(derivative: Callable[..., Tensor], value: float) -> Callable[..., Tensor]:
    """The derivative with this value where the activation's argument is NaN."""

    def decomposition(*args: Any) -> Tensor:
        _, x = (arg for arg in args if isinstance(arg, Tensor))
        return torch.where(x == x, derivative(*args), value)

    return decomposition


def _hardsigmoid_backward(d: Tensor, x: Tensor) -> Tensor:
    """With a sixth as torch's own operation has it, in float64 too: rounded to float32."""
    return torch.where((x > -3) & (x < 3), d * 0.1666666716337204, 0.0)


def _with_factor(operation: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda x, y, alpha=1: NotImplemented if alpha == 1 else operation(x, alpha * y)


_SUMS = {  # of which only those with a factor are composite
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _with_factor(torch.add)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _with_factor(torch.sub)),
}


def _power(x: Tensor, exponent: float) -> Any:
    """By what torch itself computes: the power 0.5 of −∞ is NaN as a root, and ∞ as a power."""
    return _POWERS[exponent](x) if exponent in _POWERS and x.is_floating_point() else NotImplemented


_POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    2: lambda x: x * x,
    3: lambda x: x * x * x,
    0.5: torch.sqrt,
    -0.5: torch.rsqrt,
    -1: torch.reciprocal,
    -2: lambda x: (x * x).reciprocal(),
}


def _clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    if any(bound != bound for bound in (low, high)):  # NaN
        return x * math.nan
    x = x if low is None else torch.clamp_min(x, low)
    return x if high is None else torch.clamp_max(x, high)


def _product_in_each_row(x: Tensor, y: Tensor) -> Tensor:
    """(B, n, k) by (B, k, m), or by one matrix for all, whose numbers are read in the order of memory."""
    if x.shape[-1] == 1:
        return x * y
    if isinstance(y.stride(-1), int) and isinstance(y.stride(-2), int) and y.stride(-1) > y.stride(-2):
        return (x.unsqueeze(-2) * y.mT.unsqueeze(-3)).sum(-1)
    return (x.unsqueeze(-1) * y.unsqueeze(-3)).sum(-2)


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


def _slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """What is before the source, the source, and the rest; with steps, each number and those up to the next."""
    if dim % x.ndim in row_dimensions(x):
        return source.clone() if start in (None, 0) and step == 1 and x.shape == source.shape else NotImplemented
    start, _, _ = slice(start, end).indices(x.shape[dim])
    count = source.shape[dim]
    if not count:
        return x.clone()
    last = start + step * (count - 1)
    parts = [x.narrow(dim, 0, start), source, x.narrow(dim, last + 1, x.shape[dim] - last - 1)]
    if step > 1:
        dim %= x.ndim
        others = x.narrow(dim, start, last - start).unflatten(dim, (count - 1, step)).narrow(dim + 1, 1, step - 1)
        first = source.narrow(dim, 0, count - 1).unsqueeze(dim + 1)
        parts[1:2] = [torch.cat([first, others], dim + 1).flatten(dim, dim + 1), source.narrow(dim, count - 1, 1)]
    return torch.cat([part for part in parts if part.shape[dim]], dim)


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
