"""Integrators: the ways in which two streams x (..., X) and z (..., Z) can meet and give y (..., O).

Nearly all of them tie the tensor W of one bi-affine map,

    f(x, z)_o = Σ_ij z_i W[o,i,j] x_j + Σ_i U[o,i] z_i + Σ_j V[o,j] x_j + b_o,

and say how in `terms()`. Each is built as `Class(x_features, z_features, out_features, **its own settings)`.
"""

from multint.integrators.additive import Additive, Concat
from multint.integrators.base import BiAffine, Integrator, Scaled, Sum, Through, build, outermost_integrators
from multint.integrators.batch_norm import RecurrentBatchNorm, population_statistics
from multint.integrators.bilinear import Bilinear
from multint.integrators.compose import Krause, Projected, Swapped
from multint.integrators.convert import Converted, convert
from multint.integrators.diagonal import Diagonal, Gated, SigmoidScale
from multint.integrators.factored import LowRank, Tucker
from multint.integrators.hadamard import Hadamard, MultiplicativeIntegration
from multint.integrators.hypernetwork import Hypernetwork
from multint.integrators.measures import MultilinearRank, flops, interaction, parameter_count, rank
from multint.integrators.normalised import Normalised
from multint.integrators.of_factories import ScaledOf, SumOf, SwappedOf, ThroughOf
from multint.integrators.pairwise import Pairwise, PairwiseTerms
from multint.integrators.terms import Terms

__all__ = [
    "Additive",
    "BiAffine",
    "Bilinear",
    "Concat",
    "Converted",
    "Diagonal",
    "Gated",
    "Hadamard",
    "Hypernetwork",
    "Integrator",
    "Krause",
    "LowRank",
    "MultilinearRank",
    "MultiplicativeIntegration",
    "Normalised",
    "Pairwise",
    "PairwiseTerms",
    "Projected",
    "RecurrentBatchNorm",
    "Scaled",
    "ScaledOf",
    "SigmoidScale",
    "Sum",
    "SumOf",
    "Swapped",
    "SwappedOf",
    "Terms",
    "Through",
    "ThroughOf",
    "Tucker",
    "build",
    "convert",
    "flops",
    "interaction",
    "outermost_integrators",
    "parameter_count",
    "population_statistics",
    "rank",
]
