"""Convolutions over a row's own dimensions as products of views, whose windows lie in memory as x does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multint.engines.private import row_dimensions

aten: Any = torch.ops.aten


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """x (B, C, *size) as (B, groups, 1, C / groups, *kernel, *places)."""
    count = len(kernel)
    x = aten.constant_pad_nd(x, [p for padded in reversed(padding) for p in (padded, padded)], 0.0)
    for i, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
    x = x.unflatten(1, (groups, 1, x.shape[1] // groups))
    first = 4  # where the places begin, and behind them the kernel
    return x.permute(0, 1, 2, 3, *range(first + count, first + 2 * count), *range(first, first + count))


def convolution(
    x: Tensor,  # (B, C, *size)
    weight: Tensor,  # (O, C / groups, *kernel)
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """`aten.convolution`; NotImplemented for one that is transposed."""
    kernel = weight.shape[2:]
    stride, padding, dilation = (list(some) * (len(kernel) // len(some)) for some in (stride, padding, dilation))
    if transposed or row_dimensions(weight) or row_dimensions(x) != [0]:
        return NotImplemented
    windows = _windows(x, kernel, stride, padding, dilation, groups)
    taps = weight.view(groups, weight.shape[0] // groups, weight.shape[1], *kernel, *[1] * len(kernel))
    y = (windows * taps).sum([3, *range(4, 4 + len(kernel))]).flatten(1, 2)
    return y if bias is None else y + bias.view(-1, *[1] * len(kernel))


def convolution_backward(
    d: Tensor,  # (B, O, *places)
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Any,
) -> Any:
    """The gradients of x, the weight and the bias."""
    kernel, count = weight.shape[2:], weight.ndim - 2
    stride, padding, dilation = (list(some) * (count // len(some)) for some in (stride, padding, dilation))
    if transposed:
        return NotImplemented
    of_x = of_weight = of_bias = None
    if wanted[0]:
        # A convolution of d, with zeros between its numbers and around them, by the kernel turned round.
        wide, around = d, list[int]()
        for i in range(count):
            before = dilation[i] * (kernel[i] - 1) - padding[i]
            shape = list(wide.shape)
            shape[2 + i] = stride[i] * (shape[2 + i] - 1) + 1
            if stride[i] > 1:
                wide = torch.slice_scatter(d.new_zeros(shape), wide, 2 + i, step=stride[i])
            around = [before, x.shape[2 + i] + padding[i] - shape[2 + i], *around]
        wide = aten.constant_pad_nd(wide, around, 0.0)
        taps = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip([*range(2, 2 + count)])
        of_x = convolution(wide, taps, None, [1], [0], dilation, False, None, groups)
    if wanted[1]:
        windows = _windows(x, kernel, stride, padding, dilation, groups)
        given = d.view(d.shape[0], groups, d.shape[1] // groups, *[1] * (1 + count), *d.shape[2:])
        of_weight = (windows * given).sum([*range(-count, 0)]).sum(0).flatten(0, 1)
    if wanted[2]:
        of_bias = d.sum([0, *range(2, d.ndim)])
    return of_x, of_weight, of_bias


def average(
    x: Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    ceil_mode: bool = False,
    counts_padding: bool = True,
    divisor: Any = None,
) -> Any:
    """`aten.avg_pool2d` of windows that are whole, or filled up with zeros that count."""
    if ceil_mode or divisor is not None or x.ndim != 4 or (any(padding) and not counts_padding):
        return NotImplemented
    kernel, stride, padding = (list(some) * (2 // len(some)) for some in (kernel, stride or kernel, padding))
    return _windows(x, kernel, stride, padding, [1, 1], 1).mean([4, 5]).flatten(1, 3)
