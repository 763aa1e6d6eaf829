"""95 % confidence intervals of proportions and of means. Standard library only."""

import math
from collections.abc import Sequence

Interval = tuple[float, float]

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution, for two-sided 95 % intervals."""


def wilson_interval(successes: int, trials: int) -> Interval:
    """Return Wilson's score interval of a proportion, as percentages.

    Source: E. B. Wilson 1927, "Probable inference, the law of succession, and statistical
    inference", JASA 22. Unlike the normal interval it holds near 0 and 100 %.
    """
    if not trials:
        raise ValueError("no interval of a proportion of nothing")
    z = Z_95
    share, square = successes / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    # Rounding may leave the sure ends of 0 and 100 % a hair off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return 100.0 * low, 100.0 * high


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the normal interval of a mean of values in [0, 1], as percentages, cut to [0, 100].

    The mean ± 1.96 standard errors (the central limit theorem; no random resampling, so the figure
    is the same each time). One value alone gives (0, 100). Where all are 0, or all 1, it is
    Wilson's, which has a width there.
    """
    if not values:
        raise ValueError("no interval of a mean of nothing")
    if len(values) > 1 and values[0] in (0, 1) and min(values) == max(values):
        return wilson_interval(round(math.fsum(values)), len(values))
    mean = math.fsum(values) / len(values)
    half = Z_95 * standard_error(values)
    return 100.0 * max(0.0, mean - half), 100.0 * min(1.0, mean + half)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean: s / √n, of the sample's standard deviation s.

    That of one value is not known: infinite.
    """
    if len(values) == 1:
        return math.inf
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))
