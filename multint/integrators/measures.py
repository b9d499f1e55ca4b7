"""Sizes of an integrator: its parameters, its work, and the rank of its interaction."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from multint.errors import FormError
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
