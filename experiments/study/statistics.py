"""Means and differences for few seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.core.intervals import Estimate, estimate_of

# Up to so many, all sign patterns are gone through: 2¹⁴, those of 14 pairs. Beyond, as many are drawn.
_PATTERNS = 2**14


class Difference(NamedTuple):
    """An arm minus the first, over the seeds that both have."""

    estimate: Estimate | None  # None where no seed is common
    p: float | None  # of the paired permutation test, two-sided; None below two pairs


def smallest_p(pairs: int) -> float:
    """The smallest that the permutation test can give: of 2ⁿ sign patterns, the observed one and its mirror."""
    return max(2.0 ** (1 - pairs), 2 / (_PATTERNS + 1))


def difference(
    first: Mapping[int, float],  # values by seed
    arm: Mapping[int, float],
) -> Difference:
    """arm − first, paired by the seeds that both have, with the t-interval of the differences.

    p is the share of sign patterns of the differences whose mean is as far from 0 or farther. Of 15 and more pairs it
    is estimated from 2¹⁴ patterns drawn from a fixed seed.
    """
    seeds = sorted(first.keys() & arm.keys())
    a, b = [first[seed] for seed in seeds], [arm[seed] for seed in seeds]
    differences = [y - x for x, y in zip(a, b, strict=True)]
    if len(seeds) < 2:
        return Difference(estimate_of(differences), None)
    return Difference(estimate_of(differences), _permutation_p(a, b))


def _permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy import stats

    test = stats.permutation_test(
        (b, a),
        lambda y, x, axis: (y - x).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_PATTERNS,
        rng=0,
    )
    return float(test.pvalue)
