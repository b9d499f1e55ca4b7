"""Exact Gaussian processes in float64: draws, predictions and log-likelihoods."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.functions.batches import Ceiling

_JITTER = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)  # relative to the mean variance


class Posterior(NamedTuple):
    """What is known of a function's values at some inputs."""

    mean: Tensor  # (B, N)
    std: Tensor  # (B, N), of observations: with their noise


def cholesky(covariance: Tensor) -> Tensor:  # (B, P, P) each
    """The lower factor, with as little added to the diagonal as it takes.

    Raises ExperimentError for a matrix that is no covariance.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    for jitter in _JITTER:
        shifted = (
            covariance + jitter * variance * torch.eye(covariance.shape[-1]).to(covariance) if jitter else covariance
        )
        factor, failures = torch.linalg.cholesky_ex(shifted)
        if not bool(failures.any()):
            return factor
    raise ExperimentError(
        f"The covariance of a Gaussian process is not positive, with {jitter:g} of its variance added too: raise "
        "--data.noise, or the kernel's length."
    )


def log_likelihood(
    covariance: Tensor,  # (B, P, P), of the observations: with their noise
    y: Tensor,  # (B, P)
    contexts: Tensor,  # (B,) int64: the first so many points are observed
    targets: Tensor,  # (B,) int64: and so many after them are to be predicted
) -> Ceiling:
    """log p(targets | context) of each task, exactly, per target: of each target by itself, and of all together.

    With K = LLᵀ and the points in this order, L of the targets' rows and columns is the factor of their conditional
    covariance, and L⁻¹y their standardised residuals.
    """
    L = cholesky(covariance)
    e = torch.linalg.solve_triangular(L, y.to(L).unsqueeze(-1), upper=False).squeeze(-1)
    places = torch.arange(y.shape[-1])
    first, last = contexts.unsqueeze(-1), (contexts + targets).unsqueeze(-1)
    is_target = (places >= first) & (places < last)
    conditional = torch.where(is_target.unsqueeze(-2), L, 0)  # its columns
    variance, residual = conditional.square().sum(-1), (conditional @ e.unsqueeze(-1)).squeeze(-1)
    joint = -0.5 * e.square() - L.diagonal(dim1=-2, dim2=-1).log()
    marginal = -0.5 * residual.square() / variance - 0.5 * variance.log()
    means = (torch.where(is_target, values, 0).sum(-1) / targets for values in (marginal, joint))
    return Ceiling(*(mean - 0.5 * math.log(2 * math.pi) for mean in means))


def posterior(
    of_context: Tensor,  # (B, C, C): the covariance of the observed points, with their noise
    across: Tensor,  # (B, N, C): of the others with these
    variance: Tensor,  # (B, N): of the others, with their noise
    y: Tensor,  # (B, C)
) -> Posterior:
    """What the observed points tell of others."""
    if not y.shape[-1]:
        return Posterior(torch.zeros_like(variance), variance.sqrt())
    L = cholesky(of_context)
    solved = torch.linalg.solve_triangular(L, torch.cat([across.mT, y.to(L).unsqueeze(-1)], -1), upper=False)
    weights, e = solved[..., :-1], solved[..., -1:]
    return Posterior((weights.mT @ e).squeeze(-1), (variance - weights.square().sum(-2)).clamp(min=0).sqrt())
