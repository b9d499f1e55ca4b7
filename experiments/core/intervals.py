"""95 % intervals."""

import math

CONFIDENCE = 0.95


def half_width(
    error: float,  # the standard error of a mean
    freedom: int,  # degrees of freedom that it is estimated with
) -> float:
    """Half of the 95 % t-interval, t(freedom)·error; NaN where there are none."""
    from scipy import stats  # takes a second

    return error * float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) if freedom > 0 else math.nan
