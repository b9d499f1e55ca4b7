"""The softmax's cross entropy for vocabularies whose logits do not fit into memory."""

from typing import Any

import torch
from torch import Tensor, nn

from multint.errors import FormError, OptionError, ShapeError

# Bytes of the logits that are held at once, in float32.
LOGITS_BYTES = 1 << 26


def softmax_cross_entropy(
    features: Tensor,  # (N, O)
    weight: Tensor,  # (V, O)
    bias: Tensor,  # (V,)
    targets: Tensor,  # (N,) int64
) -> Tensor:  # ()
    """−1/N Σ_n log softmax(W o_n + b)[target_n], as `cross_entropy(linear(features, weight, bias), targets)`.

    Where the logits (N, V) would take more than 64 MiB they are made a few rows at a time, and with them at once what
    the gradients need: they are never all in memory, and nothing is computed twice. That way has no second derivative,
    and says so where one is asked for.
    Under autocast the products are in its dtype, sums and exponentials in float32.

    Raises: ShapeError for tensors whose sizes do not go together; OptionError for targets that are no integers, or, on
    a CPU, outside 0 … V − 1. (A GPU's own assertion says so there.)

    (Not torch 2.13's `linear_cross_entropy` in chunks: torch 2.12 has none, and its loss in float32 was off in the
    fourth digit on a CPU.)
    """
    _check(features, weight, bias, targets)
    if len(features) * len(weight) * 4 <= LOGITS_BYTES:
        return nn.functional.cross_entropy(nn.functional.linear(features, weight, bias), targets)
    dtype = features.dtype
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
    return _InPieces.apply(features, weight, bias, targets, dtype)  # type: ignore[no-any-return]


@torch.no_grad()
def symbol_losses(
    features: Tensor,  # (N, O)
    weight: Tensor,  # (V, O)
    bias: Tensor,  # (V,)
    targets: Tensor,  # (N,) int64
) -> Tensor:  # (N,)
    """−log softmax(W o_n + b)[target_n] of each symbol, for evaluation, in pieces too. Raises as the mean does."""
    _check(features, weight, bias, targets)
    rows = max(1, LOGITS_BYTES // (4 * len(weight)))
    pieces = zip(features.split(rows), targets.split(rows), strict=True)
    return torch.cat(
        [
            # In float32 at least: the mean of many losses in bfloat16 has two digits.
            nn.functional.cross_entropy(_exact(nn.functional.linear(piece, weight, bias)), wanted, reduction="none")
            for piece, wanted in pieces
        ]
    )


def _check(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (features, weight, bias, targets)]
    if (
        (features.ndim, weight.ndim) != (2, 2)
        or features.shape[1] != weight.shape[1]
        or bias.shape != weight.shape[:1]
        or targets.shape != features.shape[:1]
    ):
        raise ShapeError(
            f"softmax: features, weight, bias and targets have the shapes {', '.join(map(str, shapes))}, expected "
            "(N, O), (V, O), (V,) and (N,)"
        )
    if targets.dtype != torch.int64:
        raise OptionError(f"softmax: targets are {targets.dtype}, expected torch.int64")
    if targets.device.type == "cpu" and len(targets):
        lowest, highest = (int(bound) for bound in targets.aminmax())
        if lowest < 0 or highest >= len(weight):
            outside = lowest if lowest < 0 else highest
            raise OptionError(
                f"softmax: a target is {outside}, expected 0 to {len(weight) - 1}, the vocabulary's indices"
            )


class _InPieces(torch.autograd.Function):
    """The gradients are made in the forward pass, while the logits are there, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        dtype: torch.dtype,  # of the products
    ) -> Tensor:
        count, with_gradients = len(features), any(ctx.needs_input_grad)
        matrix, shift = weight.to(dtype), bias.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)  # of sums and exponentials
        total = torch.zeros((), dtype=exact, device=features.device)
        if with_gradients:
            d_features = torch.empty_like(features)
            d_weight, d_bias = torch.zeros_like(weight, dtype=exact), torch.zeros_like(bias, dtype=exact)
        rows = max(1, LOGITS_BYTES // (4 * len(weight)))
        for start in range(0, count, rows):
            piece, wanted = features[start : start + rows].to(dtype), targets[start : start + rows, None]
            logits = torch.addmm(shift, piece, matrix.T).to(exact)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(-1, wanted)).sum()
            if with_gradients:
                d_logits = logits.sub_(log_sum).exp_()
                d_logits.scatter_add_(-1, wanted, d_logits.new_full((), -1.0).expand_as(wanted)).div_(count)
                d_bias += d_logits.sum(0)
                d_logits = d_logits.to(dtype)
                d_features[start : start + rows] = d_logits @ matrix
                _add_product(d_weight, d_logits, piece)
        if with_gradients:
            gradients = d_features, d_weight.to(weight.dtype), d_bias.to(bias.dtype)
            ctx.save_for_backward(*gradients, features, weight, bias)
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors
        # Tied to what they depend on, so that a second derivative is no constant's.
        scaled = (_Once.apply(d * gradient, of) for d, of in zip(saved[:3], saved[3:], strict=True))
        return *scaled, None, None


class _Once(torch.autograd.Function):
    """A gradient that has none of its own."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, of: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise FormError(
            "softmax_cross_entropy: a loss that is made in pieces has no second derivative; take "
            "torch.nn.functional.cross_entropy of all logits where they fit into memory"
        )


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _add_product(
    total: Tensor,  # (V, O)
    left: Tensor,  # (N, V)
    right: Tensor,  # (N, O)
) -> None:
    """total += leftᵀ right, in the total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right
