"""Estimates with 95 % intervals: shares, means, paired differences, differences of groups.

Intervals of means are Student's t. Those of shares are Wilson's (Wilson, JASA 1927), which keep within [0, 1] and
do not collapse at 0 and 1.
"""

import math
import sys
from collections.abc import Sequence

from scipy import stats

from allmend.results import Estimate

CONFIDENCE = 0.95


def share(successes: int, n: int) -> Estimate:
    """A share of `n` trials with its Wilson interval.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials are no share")
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at the ends the formula gives 0 and 1 but for rounding
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Estimate(value=p, low=low, high=high, n=n)


def mean(values: Sequence[float], *, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """The mean with its t interval; without an interval for a single value, or for values that do not differ.

    Equal values say nothing of how far others would lie: an interval of no width would claim certainty. `bounds` are
    what the values can be; the interval is cut to them.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values have no mean")
    centre = math.fsum(values) / n
    if n == 1 or min(values) == max(values):
        return Estimate(value=centre, n=n)
    error = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1) / n)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    return Estimate(value=centre, low=max(bounds[0], centre - half), high=min(bounds[1], centre + half), n=n)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of first minus second, pair by pair, with its t interval.

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    return mean([a - b for a, b in zip(first, second, strict=True)])


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `first` minus mean of `second`, two separate groups, with Welch's interval; n counts both.

    Raises:
        ValueError: a group is empty.
    """
    a, b = mean(first), mean(second)
    n = a.n + b.n
    if a.n == 1 or b.n == 1:
        return Estimate(value=a.value - b.value, n=n)
    var_a, var_b = (_variance(values) / len(values) for values in (first, second))
    if var_a + var_b == 0:
        return Estimate(value=a.value - b.value, n=n)
    part = var_a / (var_a + var_b)
    freedom = 1 / (part**2 / (a.n - 1) + (1 - part) ** 2 / (b.n - 1))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(var_a + var_b)
    return Estimate(value=a.value - b.value, low=a.value - b.value - half, high=a.value - b.value + half, n=n)


def exp_mean(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """exp(Σ sums / Σ counts) with an interval over clusters (delta method): a perplexity over records.

    What is too large for a float becomes the largest float.

    Args:
        sums: negative log-likelihood of each record (nats).
        counts: tokens of each record.

    Raises:
        ValueError: there is no token.
    """
    total = sum(counts)
    if total == 0:
        raise ValueError("no tokens have no perplexity")
    ratio, n = math.fsum(sums) / total, len(sums)
    if n == 1:
        return Estimate(value=_exp(ratio), n=total)
    residual = math.fsum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = math.sqrt(residual * n / (n - 1)) / total
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    return Estimate(value=_exp(ratio), low=_exp(ratio - half), high=_exp(ratio + half), n=total)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return sys.float_info.max


def _variance(values: Sequence[float]) -> float:
    centre = math.fsum(values) / len(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
