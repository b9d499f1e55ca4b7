"""Measures of an integrator: its parameters, its work, and the rank and the weight of its interaction."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from multint.errors import FormError, ShapeError
from multint.integrators.base import BiAffine, Integrator
from multint.integrators.pairwise import Pairwise


class MultilinearRank(NamedTuple):
    """The ranks of the three unfoldings of W; none of them exceeds W's CP rank."""

    out: int
    z: int
    x: int


def parameter_count(f: torch.nn.Module) -> int:
    """The number of learnt numbers in f; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in f.parameters())


def flops(f: Integrator | Pairwise) -> int:
    """The floating-point operations of f's matrix products for one row of each stream; a multiply-add counts as two."""
    # Imported here, since it brings triton where that is installed.
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(f.parameters())
    features = f.features if isinstance(f, Pairwise) else (f.x_features, f.z_features)
    streams = [parameter.new_zeros(1, n) for n in features]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        f(*streams)
    return counter.get_total_flops()


def rank(f: Integrator) -> MultilinearRank:
    """The multilinear rank of f's interaction tensor W (O, Z, X), computed numerically in float64.

    (0, 0, 0) where the streams do not multiply; (R, R, R) for a `LowRank` of rank R within the features.
    Raises: FormError where f is not bi-affine.
    """
    if not isinstance(f, BiAffine):
        raise FormError(f"{type(f).__name__} is not bi-affine: its interaction has no rank")
    # A copy in float64: rounding in float32 factors would fill up the rank of their product.
    W = copy.deepcopy(f).double().terms().W.detach()
    return MultilinearRank(*(int(torch.linalg.matrix_rank(W.movedim(mode, 0).flatten(1))) for mode in range(3)))


_DENSE = 2**24  # numbers of W, beyond which its outputs are looked at instead


def interaction(
    f: Integrator,
    x: Tensor,  # (..., X)
    z: Tensor,  # (..., Z)
) -> float:
    """The share of the variance of y = f(x, z) that neither stream explains alone: Sobol' index of second order.

    With y = m + a(x) + b(z) + c(x, z), where a and b are the means over the other stream less m, it is Σ_o Var c_o /
    Σ_o Var y_o. 0 where the streams add, 1 where y is the product of two streams of mean 0, and NaN where y never
    changes. What a product brings with a stream whose mean is not 0 is the other one's own.

    The two samples stand for independent streams: every x meets every z. For a bi-affine f that follows from its
    `terms()` and the samples' moments, elsewhere from f of all pairs. In float64 and in evaluation, on a copy.

    Raises: ShapeError for streams of other features, or of fewer than two rows.
    Source: Sobol' 1993.
    """
    for name, stream, features in (("x", x, f.x_features), (f.z_name, z, f.z_features)):
        if stream.ndim < 2 or stream.shape[-1] != features or stream[..., 0].numel() < 2:
            raise ShapeError(
                f"interaction: {name} has the shape {tuple(stream.shape)}, expected (N, {features}), with two rows or "
                "more"
            )
    x, z = (stream.detach().double().flatten(0, -2) for stream in (x, z))
    f = copy.deepcopy(f).double().eval()
    with torch.no_grad():
        whole, alone = _by_terms(f, x, z) or _by_pairs(f, x, z)
    return (1 - alone / whole).clamp(min=0).item()


def _by_terms(f: Integrator, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Σ Var y and Σ (Var a + Var b) by the dense form; None where there is none, or a large one."""
    if not isinstance(f, BiAffine) or f.out_features * f.x_features * f.z_features > _DENSE:
        return None
    try:
        W, U, V, _ = f.terms()
    except FormError:  # of a part
        return None
    (x_mean, x_covariance), (z_mean, z_covariance) = (
        (stream.mean(0), torch.cov(stream.T, correction=0).reshape(2 * [stream.shape[1]])) for stream in (x, z)
    )
    of_z, of_x = U + W @ x_mean, V + torch.einsum("oij,i->oj", W, z_mean)
    alone = ((of_z @ z_covariance) * of_z).sum() + ((of_x @ x_covariance) * of_x).sum()
    return alone + (torch.einsum("ik,okl->oil", z_covariance, W @ x_covariance) * W).sum(), alone


def _by_pairs(f: Integrator, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same by f of every x with every z, one x at a time."""
    of_x, of_z, squares = [], x.new_zeros(()), x.new_zeros(())
    origin = f(x.mean(0), z.mean(0))  # near the mean, so that little is lost where it is large
    for row in x:
        y = f(row, z) - origin
        of_x.append(y.mean(0))
        of_z, squares = of_z + y / len(x), squares + y.square().mean(0) / len(x)
    mean = torch.stack(of_x).mean(0)
    alone = torch.stack(of_x).var(0, correction=0) + of_z.var(0, correction=0)
    return (squares - mean.square()).sum(), alone.sum()
