"""An empirical lower bound on ε from one run: how well do scores tell canaries that went in from those that did not?

Source: Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2 and its
corollary on p-values. Each of m canaries goes in or stays out by a fair coin of its own; from the outcome of training
alone, r of the coins are guessed and v of the guesses are right. If training is ε-DP for one canary more or less, v is
stochastically no larger than W ~ Binomial(r, e^ε / (1 + e^ε)). If it is (ε, δ)-DP, v may exceed W by further F ≥ 0
whose mean is at most 2 m δ, so that

    P[v guesses or more are right] ≤ P[W ≥ v] + 2 m δ max_i P[v > W ≥ v − i] / i.

The bound is on what the canaries as they were planted cost: ε of one record where each stands once, that of c records
together where it stands c times. It says nothing of records that are easier to tell than the canaries.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binom

from allmend.results import EpsilonBound

SIDE = 1 / 3
"""Share of the canaries guessed to have gone in, and as many to have stayed out, set before any score is seen.

The best share is larger where scores separate the canaries and smaller where they hardly do, and to pick it afterwards
would spoil the confidence unless each candidate is tested at its part of the level. In simulations with Gaussian
scores (shifts of 0.5 to 6 standard deviations) a fixed third leads to a bound on average no lower than such a pick
from two to four shares does, for 24 and 48 canaries at every shift, for 96 and more at shifts of 3 and 6. Between them
the pick gains up to a tenth for 96 canaries, and up to a half for 1,000.
"""

_TOLERANCE = 1e-6


def epsilon_bound(
    scores: Sequence[float],
    inserted: Sequence[bool],
    *,
    model: str,
    copies: int | None,
    delta: float,
    confidence: float = 0.95,
    accounted: float | None = None,
    score: str = "ratio",
) -> EpsilonBound:
    """The largest ε that the canaries refute at this confidence.

    The third of the canaries with the highest scores is guessed to have gone in, the third with the lowest to have
    stayed out. A guess that would have to choose among equal scores counts as wrong: it depends neither on the coins
    nor on the order of the canaries, and can only lower the bound.

    Args:
        scores: of each canary, higher for those that seem to have gone in; they depend on the coins through training
            alone.
        inserted: the coins, fair and independent.
        model, copies, accounted, score: for the table.
        delta: of the guarantee that is tested.
        confidence: of the bound, over coins and training.

    Raises:
        ValueError: no canaries, another number of coins than of scores, or a score that is not a number.
    """
    values, coins = np.asarray(scores, dtype=float), np.asarray(inserted, dtype=bool)
    count = len(values)
    if count == 0 or values.shape != coins.shape or np.isnan(values).any():
        raise ValueError(f"each canary needs a coin and a score that is a number, got {scores} and {inserted}")
    side = round(SIDE * count)
    ordered = np.sort(values)
    high, low = values > ordered[count - side - 1], values < ordered[side]
    right = int((high & coins).sum() + (low & ~coins).sum())
    epsilon = lower_bound(right, 2 * side, coins=count, delta=delta, confidence=confidence)
    return EpsilonBound(
        model=model,
        copies=copies,
        epsilon=epsilon,
        delta=delta,
        confidence=confidence,
        guesses=2 * side,
        right=right,
        canaries=count,
        accounted=accounted,
        score=score,
    )


def lower_bound(right: int, guesses: int, *, coins: int, delta: float, confidence: float = 0.95) -> float:
    """The largest ε with a p-value below 1 − confidence, as are those of all smaller ones; 0 where there is none."""

    def excess(epsilon: float) -> float:
        return p_value(right, guesses, coins=coins, epsilon=epsilon, delta=delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
    # the p-value grows with ε as long as it is below one half
    return max(0.0, float(brentq(excess, 0.0, high, xtol=_TOLERANCE)) - 2 * _TOLERANCE)


def p_value(right: int, guesses: int, *, coins: int, epsilon: float, delta: float) -> float:
    """At most how probable so many right guesses are if training is (ε, δ)-DP.

    Args:
        right: v, of `guesses`.
        guesses: r, at most `coins`.
        coins: m.

    Raises:
        ValueError: not 0 ≤ v ≤ r ≤ m, ε ≥ 0 and δ in [0, 1].
    """
    if not (0 <= right <= guesses <= coins and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"no audit has v = {right}, r = {guesses}, m = {coins}, ε = {epsilon} and δ = {delta}")
    q = expit(epsilon)
    as_many = float(binom.sf(right - 1, guesses, q))
    steps = np.arange(1, right + 1)
    nearly = binom.sf(right - 1 - steps, guesses, q) - as_many
    return min(1.0, as_many + 2 * coins * delta * float(np.max(nearly / steps, initial=0.0)))
