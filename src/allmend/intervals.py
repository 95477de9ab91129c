"""Estimates with 95 % intervals: shares, means, paired differences, differences of groups.

Intervals of means are Student's t. Those of shares are Wilson's (Wilson, JASA 1927), which keep within [0, 1] and
do not collapse at 0 and 1. A mean of shares has Student's, kept from collapsing by Wilson's.
"""

import math
import sys
from collections.abc import Sequence

from scipy import stats

from allmend.results import Estimate

CONFIDENCE = 0.95

ROUNDING = 1e-12
"""Share of a sum of squares that may come from rounding."""


def share(successes: int, n: int) -> Estimate:
    """A share of `n` trials with its Wilson interval.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials are no share")
    return _wilson(successes / n, n)


def _wilson(p: float, n: int) -> Estimate:
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at the ends the formula gives 0 and 1 but for rounding
    low = 0.0 if p == 0 else max(0.0, centre - half)
    high = 1.0 if p == 1 else min(1.0, centre + half)
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


def mean_of_sums(total: float, squares: float, n: int) -> Estimate:
    """`mean` of n values from their sum and the sum of their squares.

    Raises:
        ValueError: no values.
    """
    if n == 0:
        raise ValueError("no values have no mean")
    centre = total / n
    spread = squares - n * centre**2
    if n == 1 or spread <= ROUNDING * squares:
        return Estimate(value=centre, n=n)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * math.sqrt(spread / (n - 1) / n)
    return Estimate(value=centre, low=centre - half, high=centre + half, n=n)


def mean_share(shares: Sequence[float]) -> Estimate:
    """The mean of independent shares, such as of each text's secrets, with its t interval; n counts the shares.

    Where they are all equal, or there is one, the interval is Wilson's for as many trials: no spread of shares with
    that mean is wider than that of ones and zeros. Near 0 and 1 the interval is no narrower than where all shares are
    0, or 1: a few that differ from the others do not tell more than none.

    Raises:
        ValueError: no shares.
    """
    found = mean(shares, bounds=(0, 1))
    if found.low is None or found.high is None:
        return _wilson(found.value, found.n)
    none, every = share(0, found.n), share(found.n, found.n)
    low, high = min(found.low, every.low or 0.0), max(found.high, none.high or 1.0)
    return Estimate(value=found.value, low=low, high=high, n=found.n)


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
    """exp of `ratio`: a perplexity over records. What is too large for a float becomes the largest float."""
    log = ratio(sums, counts)
    if log.low is None or log.high is None:
        return Estimate(value=exp(log.value), n=log.n)
    return Estimate(value=exp(log.value), low=exp(log.low), high=exp(log.high), n=log.n)


def ratio(sums: Sequence[float], counts: Sequence[int], *, confidence: float = CONFIDENCE) -> Estimate:
    """Σ sums / Σ counts with an interval over clusters (delta method): a mean over the tokens of records.

    There is no interval for a single record, nor for records whose means do not differ (see `mean`). n counts tokens.

    Args:
        sums: of each record, such as its negative log-likelihood (nats).
        counts: tokens of each record.
        confidence: of the interval.

    Raises:
        ValueError: there is no token.
    """
    value, error = _ratio(sums, counts)
    if error is None:
        return Estimate(value=value, n=sum(counts))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(sums) - 1)) * error
    return Estimate(value=value, low=value - half, high=value + half, n=sum(counts))


def mean_ratio(groups: Sequence[tuple[Sequence[float], Sequence[int]]]) -> Estimate:
    """The mean over groups of their `ratio`, all groups alike, whose records are independent; n counts tokens.

    The interval is for these groups: records vary, groups do not. It has Welch's degrees of freedom, and there is none
    if a group has none. Sums that are all exactly 0, such as those of a model minus itself, have no error.

    Raises:
        ValueError: there is no group, or one has no token.
    """
    if not groups:
        raise ValueError("no groups have no mean")
    found = [_ratio(sums, counts) for sums, counts in groups]
    value, n = math.fsum(one for one, _ in found) / len(found), sum(sum(counts) for _, counts in groups)
    errors = [error if any(sums) else 0.0 for (sums, _), (_, error) in zip(groups, found, strict=True)]
    variances = [(error / len(found)) ** 2 for error in errors if error is not None]
    if len(variances) < len(groups) or not any(variances):
        return Estimate(value=value, n=n)
    total = math.fsum(variances)
    spread = zip(variances, groups, strict=True)
    freedom = total**2 / math.fsum(v**2 / (len(sums) - 1) for v, (sums, _) in spread if v)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(total)
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def _ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """A ratio and its standard error; None where that cannot be told."""
    total = sum(counts)
    if total == 0:
        raise ValueError("no tokens have no mean")
    value, n = math.fsum(sums) / total, len(sums)
    residual = math.fsum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    if n == 1 or residual <= ROUNDING * math.fsum(s * s for s in sums):
        return value, None
    return value, math.sqrt(residual * n / (n - 1)) / total


def exp(x: float) -> float:
    """exp; what is too large for a float becomes the largest float."""
    try:
        return math.exp(x)
    except OverflowError:
        return sys.float_info.max


def _variance(values: Sequence[float]) -> float:
    centre = math.fsum(values) / len(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
