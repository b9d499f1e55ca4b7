"""Log-likelihoods of a neural process and their bounds: for each task, per target point, in nats."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.neural_process.encoders import Gaussian
from models.neural_process.points import Points, check_points
from models.neural_process.process import NeuralProcess
from multint.errors import OptionError, ShapeError


class LogLikelihood(NamedTuple):
    """log p(targets | context) of each task, divided by the number of its targets.

    Without a latent path the two are equal.
    """

    marginal: Tensor  # (B,): the mean over points of log mean_k p(y_n | z_k), each point by itself
    joint: Tensor  # (B,): log mean_k Π_n p(y_n | z_k), all points of a task together


def log_likelihood(
    network: NeuralProcess,
    context: Points,  # (B, C, ·)
    targets: Points,  # (B, N, ·)
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """The log-likelihood with so many draws z_k ~ p(z | context); exact, without a draw, where there is no latent path.

    The logarithm of a mean over draws is too low on average, less so the more draws.
    """
    targets = _checked(network, targets)
    if network.latent is None:
        each = _point_log_density(network(context, targets.x), targets).sum(-1) / targets.counts
        return LogLikelihood(each, each)
    z = network.prior(context).sample(_at_least_one(samples), generator)
    of_points = _point_log_density(network(context, targets.x, z), targets)  # (K, B, N)
    marginal = _log_mean_exp(of_points).sum(-1) / targets.counts
    return LogLikelihood(marginal, _log_mean_exp(of_points.sum(-1)) / targets.counts)


def importance_weighted(
    network: NeuralProcess,
    context: Points,  # (B, C, ·)
    targets: Points,  # (B, N, ·)
    everything: Points,  # (B, C + N, ·)
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B,)
    """log mean_k p(targets | z_k) p(z_k | context) / q(z_k | everything), z_k ~ q(z | everything), per target.

    On average it is below the joint log-likelihood and rises with the draws. With one draw it is an ELBO.
    Source: Burda et al. 2016, equation 8.
    """
    targets = _checked(network, targets)
    prior, posterior = network.prior(context), network.prior(everything)
    z = posterior.sample(_at_least_one(samples), generator)
    of_tasks = _point_log_density(network(context, targets.x, z), targets).sum(-1)  # (K, B)
    weights = of_tasks + (prior.log_density(z) - posterior.log_density(z)).sum(-1)
    return _log_mean_exp(weights) / targets.counts


def elbo(
    network: NeuralProcess,
    context: Points,  # (B, C, ·)
    targets: Points,  # (B, N, ·)
    everything: Points,  # (B, C + N, ·)
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B,)
    """E_q[log p(targets | z)] − KL(q(z | everything) ‖ p(z | context)), per target.

    Source: Garnelo et al. 2018 (Neural Processes), equation 9. In their public notebook the targets are everything.
    """
    targets = _checked(network, targets)
    prior, posterior = network.prior(context), network.prior(everything)
    z = posterior.sample(_at_least_one(samples), generator)
    of_tasks = _point_log_density(network(context, targets.x, z), targets).sum(-1)  # (K, B)
    return (of_tasks.mean(0) - posterior.divergence(prior)) / targets.counts


def _point_log_density(
    prediction: Gaussian,  # (..., B, N, Y)
    targets: Points,  # (B, N, ·), with finite padding
) -> Tensor:  # (..., B, N)
    """log p(y_n) of each target, summed over its features; 0 at the padding."""
    of_points = prediction.log_density(targets.y).sum(-1)
    return of_points if targets.mask is None else torch.where(targets.mask, of_points, 0)


def _checked(network: NeuralProcess, targets: Points) -> Points:
    """The targets with zeros as padding."""
    check_points("NeuralProcess", "targets", targets, network.x_features, network.y_features)
    if targets.x.shape[1] == 0 or (targets.mask is not None and not bool(targets.mask.any(-1).all())):
        raise ShapeError("NeuralProcess: a task has no targets, expected at least one for each")
    return targets.filled()


def _at_least_one(samples: int) -> int:
    if samples < 1:
        raise OptionError(f"NeuralProcess: samples is {samples}, expected at least 1")
    return samples


def _log_mean_exp(values: Tensor) -> Tensor:
    """log mean exp over the first dimension."""
    return values.logsumexp(0) - math.log(len(values))
