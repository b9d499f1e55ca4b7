"""From one bi-affine form to another: a full layer can be trained, and then made small."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multint.errors import FormError
from multint.integrators.additive import Additive, Concat
from multint.integrators.base import Integrator, build, terms_of
from multint.integrators.bilinear import Bilinear, LowerOrder
from multint.integrators.checks import check_factory
from multint.integrators.factored import LowRank, Tucker
from multint.integrators.terms import Terms

_SWEEPS, _STARTS = 300, 3  # of alternating least squares, which has many minima
_STALLED = 1e-7  # a sweep that lowers the error by less than this share of the tensor's norm is the last


class Converted(NamedTuple):
    """What `convert` gives."""

    integrator: Integrator
    error: float  # relative, see `convert`


def convert(f: Integrator, form: Callable[..., Integrator], **settings: Any) -> Converted:
    """An integrator of another form that is near to f, and how far it is from it.

    Near by the sum of squares over the dense forms' terms W, U, V and b. Where both streams have mean 0 and covariance
    I and are independent, that is the mean square of the outputs' difference, and the error, √(Σ (difference)² /
    Σ (f's)²), is its root relative to that of f's outputs.

    `Bilinear` in one block can hold every bi-affine form exactly; `Additive` and `Concat` all but the interaction. A
    `LowRank` or `Tucker` that has f's ranks is found exactly, to rounding, but for a LowRank above the second largest
    of O, Z and X; below f's ranks it is a minimum that need not be the smallest.

    Args:
        f: bi-affine. It stays as it is, and shares no weight with the result.
        form: `Additive`, `Concat`, `Bilinear`, `LowRank`, `Tucker`, or what else builds one of them.
        settings: of the form, as `rank=16`.

    Raises: FormError where f is not bi-affine or its numbers are not finite, or for another form; what the form raises
    for its settings.
    """
    check_factory(f, "form", form, "(X, Z, O) -> Integrator")
    wanted = Terms(*(term.detach() for term in terms_of(copy.deepcopy(f).double())))
    if not all(term.isfinite().all() for term in wanted):
        raise FormError(f"convert: the dense form of {type(f).__name__} holds numbers that are not finite")
    sizes = f.x_features, f.z_features, f.out_features
    found = build(f, "form", lambda *sizes: form(*sizes, **settings), *sizes).to(wanted.W.device)
    like = next((parameter for parameter in f.parameters()), wanted.W)
    found.double()
    with torch.no_grad():
        _take(found, wanted)
        found.to(like.dtype)
        given = terms_of(copy.deepcopy(found).double())
    left, whole = (sum(term.square().sum().item() for term in of) for of in (wanted + given.scaled(-1.0), wanted))
    return Converted(found, (left / whole) ** 0.5 if whole else left**0.5)


@singledispatch
def _take(g: Integrator, wanted: Terms) -> None:
    """Give g the parameters by which its dense form is nearest to the one that is wanted."""
    raise FormError(
        f"convert: no way to a {type(g).__name__} is known, expected Additive, Concat, Bilinear, LowRank or Tucker"
    )


@_take.register
def _(g: Additive, wanted: Terms) -> None:
    _set(g.x_projection.weight, wanted.V)
    _set(g.z_projection.weight, wanted.U)
    _set(g.bias, wanted.b)


@_take.register
def _(g: Concat, wanted: Terms) -> None:
    _set(g.projection.weight, torch.cat([wanted.V, wanted.U], dim=1))
    _set(g.bias, wanted.b)


@_take.register
def _(g: Bilinear, wanted: Terms) -> None:
    _set(g.interaction.weight, g.interaction.within_blocks(wanted.W))
    _take_lower(g.lower, wanted)


@_take.register
def _(g: LowRank, wanted: Terms) -> None:
    P, R, Q = cp(wanted.W, g.rank)
    _set(g.out_factor.weight, P)
    _set(g.z_factor.weight, R)
    _set(g.x_factor.weight, Q)
    _take_lower(g.lower, wanted)


@_take.register
def _(g: Tucker, wanted: Terms) -> None:
    G, R, Q = tucker(wanted.W, g.z_rank, g.x_rank)
    _set(g.core.weight, G)
    _set(g.z_factor.weight, R)
    _set(g.x_factor.weight, Q)
    _take_lower(g.lower, wanted)


def _take_lower(lower: LowerOrder, wanted: Terms) -> None:
    for projection, term in ((lower.z_projection, wanted.U), (lower.x_projection, wanted.V)):
        if projection is not None:
            _set(projection.weight, term)
    _set(lower.bias, wanted.b)


def _set(parameter: Tensor | None, value: Tensor) -> None:
    if parameter is not None:
        parameter.copy_(value)


def tucker(
    W: Tensor,  # (O, Z, X)
    z_rank: int,
    x_rank: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (O, Rz, Rx), (Rz, Z), (Rx, X)
    """A core and two factors with orthonormal rows, W[o,i,j] ≈ Σ_pq G[o,p,q] R[p,i] Q[q,j].

    They start at the leading singular vectors of the unfoldings, and each is then the best for the other until none
    changes. Exact where W has these ranks; else a minimum that need not be the smallest.

    Source: De Lathauwer, De Moor and Vandewalle 2000, higher-order orthogonal iteration.
    """
    Q, error = _leading(W.flatten(0, 1), x_rank), W.norm()
    for _ in range(_SWEEPS):
        R = _leading((W @ Q.T).transpose(1, 2).flatten(0, 1), z_rank)
        of_z = torch.einsum("oij,pi->opj", W, R)
        Q = _leading(of_z.flatten(0, 1), x_rank)
        G = of_z @ Q.T
        # The factors are orthonormal, so what the core has not is the error.
        before, error = error, (W.square().sum() - G.square().sum()).clamp(min=0).sqrt()
        if before - error <= _STALLED * W.norm():
            break
    return G, R, Q


def _leading(
    matrix: Tensor,  # (N, I)
    count: int,
) -> Tensor:  # (count, I)
    """The leading right singular vectors; where N is fewer, some that complete them."""
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return vectors.flip(1)[:, :count].T


def cp(
    W: Tensor,  # (O, Z, X), finite
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (O, R), (R, Z), (R, X)
    """Three factors of one scale, W[o,i,j] ≈ Σ_r P[o,r] R[r,i] Q[r,j], by alternating least squares from some starts.

    The first start is exact where W has this rank, at most the second largest of its sizes, and its factors are
    generic. Elsewhere the best of what was found is a minimum that need not be the smallest, and a smallest need not
    exist.

    Source: Kolda and Bader 2009, section 3; the first start is Harshman's of 1972, attributed to Jennrich.
    """
    generator = torch.Generator().manual_seed(0)  # the same numbers give the same factors
    best, least = None, torch.inf
    for start in range(_STARTS):
        factors = None if start else _jennrich(W, rank, generator)
        if factors is None:
            factors = [torch.randn(n, rank, generator=generator, dtype=W.dtype).to(W.device) for n in W.shape]
        error = torch.inf
        for _ in range(_SWEEPS):
            for mode in range(3):
                factors[mode] = _solved(W, factors, mode)
            before, error = error, (torch.einsum("or,ir,jr->oij", *factors) - W).norm().item()
            if not before - error > _STALLED * W.norm():
                break
        if error < least:
            best, least = factors, error
        if least <= 1e-12 * W.norm():
            break
    assert best is not None
    norms = [factor.norm(dim=0) for factor in best]
    scale = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    tiny = torch.finfo(W.dtype).tiny
    P, R, Q = (factor * (scale / norm.clamp(min=tiny)) for factor, norm in zip(best, norms, strict=True))
    # Where a product adds nothing, P alone is 0: were all three, none would have a gradient to be trained by.
    unused = scale <= 1e-6 * scale.max()
    P[:, unused] = 0
    for factor in (R, Q):
        drawn = torch.randn(factor.shape, generator=generator, dtype=W.dtype).to(W.device)
        factor[:, unused] = drawn[:, unused] / len(factor) ** 0.5
    return P, R.T, Q.T


def _solved(W: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """The best factor (N, R) of a mode for the other two."""
    first, second = (factors[other] for other in range(3) if other != mode)
    gram = (first.T @ first) * (second.T @ second)
    return torch.einsum("nij,ir,jr->nr", W.movedim(mode, 0), first, second) @ torch.linalg.pinv(gram, hermitian=True)


def _jennrich(W: Tensor, rank: int, generator: torch.Generator) -> list[Tensor] | None:
    """Factors by the eigenvectors of two mixed slices; None for a rank above the second largest of the sizes."""
    third, second, first = sorted(range(3), key=lambda mode: W.shape[mode])
    if rank > W.shape[second] or W.shape[third] < 2:
        return None
    T = W.permute(first, second, third)
    A, B = _leading(T.transpose(1, 2).flatten(1).T, rank), _leading(T.permute(1, 0, 2).flatten(1).T, rank)
    mixes = torch.randn(T.shape[2], 2, generator=generator, dtype=W.dtype).to(W.device)
    slices = torch.einsum("pa,abc,qb,cm->mpq", A, T, B, mixes)  # each A' D B'ᵀ of (R, R) factors and a diagonal D
    try:
        vectors = torch.linalg.eig(slices[0] @ torch.linalg.pinv(slices[1])).eigenvectors.real
    except RuntimeError:  # it does not converge
        return None
    of_first = A.T @ vectors
    rest = torch.linalg.pinv(of_first) @ T.flatten(1)  # (R, second · third), of which each row is a product
    left, values, right = torch.linalg.svd(rest.view(rank, T.shape[1], T.shape[2]), full_matrices=False)
    found: list[Tensor] = [W] * 3
    found[first], found[second], found[third] = of_first, (left[..., 0] * values[:, :1]).T, right[:, 0].T
    return found
