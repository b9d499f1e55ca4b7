"""Means with their 95 % t-intervals, and how they are shown."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean, and half of its 95 % t-interval, which one sample does not have."""

    mean: float
    half_width: float | None
    count: int  # of independent samples

    @property
    def low(self) -> float | None:
        """The interval's lower end; None where there is no interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """The interval's upper end; None where there is no interval."""
        return None if self.half_width is None else self.mean + self.half_width

    def interval(self, shown: Callable[[float], str]) -> str:
        """Such as "0.41 to 0.47"; empty where there is no interval."""
        return "" if self.low is None or self.high is None else f"{shown(self.low)} to {shown(self.high)}"

    def with_half_width(self, shown: Callable[[float], str]) -> str:
        """Such as "0.44 ± 0.03"; the mean alone where there is no interval."""
        return shown(self.mean) + ("" if self.half_width is None else f" ± {shown(self.half_width)}")


def estimated(
    mean: float,
    error: float,  # the mean's standard error
    count: int,  # of independent samples, that it was estimated from
) -> Estimate:
    """The mean with the interval mean ± t(count − 1)·error."""
    if count < 2:
        return Estimate(mean, None, count)
    from scipy import stats  # takes a second

    return Estimate(mean, error * float(stats.t.ppf(0.975, count - 1)), count)


def estimate_of(values: Sequence[float]) -> Estimate | None:
    """The mean of the values with its 95 % t-interval, mean ± t(n − 1) s / √n; None of no values."""
    count = len(values)
    if count == 0:
        return None
    mean = math.fsum(values) / count
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, count - 1) / count)
    return estimated(mean, error, count)
