import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import binom

from allmend.audit.epsilon import epsilon_bound, lower_bound, p_value
from allmend.results import EpsilonBound

SEEDS = 400
ALLOWED = binom.ppf(0.999, SEEDS, 0.05)
"""So many of the seeds may violate a bound at 95 %, by chance."""

Coins = np.ndarray
Mechanism = Callable[[np.random.Generator, Coins], np.ndarray]


def bound(scores: np.ndarray, coins: Coins, *, delta: float = 0.0) -> EpsilonBound:
    return epsilon_bound(scores.tolist(), coins.tolist(), model="m", copies=1, delta=delta)


def bounds(mechanism: Mechanism, count: int, *, delta: float = 0.0) -> np.ndarray:
    """The bounds that `SEEDS` runs of a mechanism on fair coins lead to."""
    found = []
    for seed in range(SEEDS):
        generator = np.random.default_rng(seed)
        coins = generator.random(count) < 0.5
        found.append(bound(mechanism(generator, coins), coins, delta=delta).epsilon)
    return np.array(found)


@pytest.mark.parametrize(
    ("coins", "guesses", "right", "delta", "printed"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_values_printed_in_the_source(coins: int, guesses: int, right: int, delta: float, printed: float) -> None:
    assert lower_bound(right, guesses, coins=coins, delta=delta) == pytest.approx(printed, abs=1e-3)


@pytest.mark.parametrize("guesses", [5, 20, 300])
def test_all_right_has_a_closed_form(guesses: int) -> None:
    """q^r = 0.05 with q = e^ε / (1 + e^ε)."""
    q = 0.05 ** (1 / guesses)
    found = lower_bound(guesses, guesses, coins=guesses, delta=0.0)
    assert found == pytest.approx(math.log(q / (1 - q)), abs=1e-5)
    assert p_value(guesses, guesses, coins=guesses, epsilon=found, delta=0.0) < 0.05


@given(st.integers(1, 20), st.integers(0, 30), st.data(), st.floats(0, 5), st.sampled_from([0.0, 1e-4, 0.01, 0.1, 0.5]))
@settings(deadline=None, max_examples=60)
def test_the_p_value_is_the_worst_case(
    guesses: int, abstained: int, data: st.DataObject, epsilon: float, delta: float
) -> None:
    """The most that P[W + F ≥ v] can be over all F ≥ 0 with a mean of 2 m δ, by linear programming."""
    coins, right = guesses + abstained, data.draw(st.integers(0, guesses))
    q, extra = math.exp(epsilon) / (1 + math.exp(epsilon)), np.arange(coins + 1)
    reached = np.array(
        [1 - sum(math.comb(guesses, w) * q**w * (1 - q) ** (guesses - w) for w in range(right - f)) for f in extra]
    )
    mean = 2 * coins * delta
    worst = -linprog(-reached, A_ub=[extra], b_ub=[mean], A_eq=[np.ones(coins + 1)], b_eq=[1]).fun
    found = p_value(right, guesses, coins=coins, epsilon=epsilon, delta=delta)
    if mean <= 1:
        assert found == pytest.approx(worst, abs=1e-7)
    assert found >= worst - 1e-7


@given(st.integers(2, 150), st.data(), st.sampled_from([0.0, 1e-5, 1e-3]))
@settings(deadline=None, max_examples=60)
def test_directions(guesses: int, data: st.DataObject, delta: float) -> None:
    coins, right = 2 * guesses, data.draw(st.integers(guesses // 2, guesses - 1))
    found = lower_bound(right, guesses, coins=coins, delta=delta)
    assert found <= lower_bound(right + 1, guesses, coins=coins, delta=delta) + 1e-5
    assert found <= lower_bound(right, guesses, coins=coins, delta=delta, confidence=0.9) + 1e-5
    assert found >= lower_bound(right, guesses, coins=coins, delta=delta + 0.01) - 1e-5
    assert found >= lower_bound(right, guesses, coins=2 * coins, delta=delta) - 1e-5
    smaller = [p_value(right, guesses, coins=coins, epsilon=e, delta=delta) for e in np.linspace(0, found, 20)]
    assert found == 0 or (np.diff(smaller) >= -1e-12).all()


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_keeps_the_confidence(epsilon: float) -> None:
    """Its ε is exact, and no scores tell more: the bound must come near it and seldom exceed it."""

    def respond(generator: np.random.Generator, coins: Coins) -> np.ndarray:
        flipped = generator.random(len(coins)) < 1 / (1 + math.exp(epsilon))
        return (coins ^ flipped) + 0.1 * generator.random(len(coins))

    found = bounds(respond, 400)
    assert (found > epsilon).sum() <= ALLOWED
    assert (found > epsilon).sum() > 0
    assert np.median(found) > 0.3 * epsilon


def test_a_mechanism_that_fails_with_probability_delta_keeps_the_confidence() -> None:
    """Randomised response that gives all coins away once in 50 runs."""
    epsilon, delta = 1.0, 0.02

    def respond(generator: np.random.Generator, coins: Coins) -> np.ndarray:
        flipped = generator.random(len(coins)) < (generator.random() > delta) / (1 + math.exp(epsilon))
        return (coins ^ flipped) + 0.1 * generator.random(len(coins))

    found = bounds(respond, 60, delta=delta)
    assert (found > epsilon).sum() <= ALLOWED
    assert (bounds(respond, 60) > epsilon).sum() > (found > epsilon).sum()


def test_the_gaussian_mechanism_keeps_the_confidence() -> None:
    sigma, delta = 0.7, 1e-4
    found = bounds(lambda generator, coins: coins + sigma * generator.normal(size=len(coins)), 200, delta=delta)
    assert (found > dp_accounting.get_epsilon_gaussian(sigma, delta)).mean() <= 0.05
    assert np.median(found) > 0.5


def test_noise_refutes_nothing() -> None:
    found = bounds(lambda generator, coins: generator.normal(size=len(coins)), 100)
    assert (found > 0).sum() <= ALLOWED


def test_perfect_scores_refute_more_with_more_canaries() -> None:
    found = [
        bound(coins.astype(float) + np.linspace(0, 0.1, len(coins)), coins) for coins in map(halves, (12, 60, 600))
    ]
    assert [one.right for one in found] == [one.guesses for one in found] == [8, 40, 400]
    q = 0.05 ** (1 / 400)
    assert 0 < found[0].epsilon < found[1].epsilon < found[2].epsilon == pytest.approx(math.log(q / (1 - q)), abs=1e-5)
    worst = bound(-halves(40).astype(float) + np.linspace(0, 0.1, 40), halves(40))
    assert (worst.right, worst.epsilon) == (0, 0.0)


def halves(count: int) -> Coins:
    return np.arange(count) < count // 2


def test_equal_scores_tell_nothing_in_whatever_order() -> None:
    coins = halves(40)
    for order in (coins, ~coins):
        found = bound(np.zeros(40), order)
        assert (found.guesses, found.right, found.epsilon) == (26, 0, 0.0)


def test_the_order_of_canaries_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    coins = generator.random(60) < 0.5
    scores = np.round(generator.normal(size=60) + 2 * coins, 1)  # with ties
    shuffled = generator.permutation(60)
    assert bound(scores, coins) == bound(scores[shuffled], coins[shuffled])


def test_what_the_table_says() -> None:
    found = epsilon_bound(
        list(range(30)),
        [place >= 15 for place in range(30)],
        model="fedavg",
        copies=10,
        delta=1e-3,
        confidence=0.9,
        accounted=2.5,
        score="loss",
    )
    assert found == EpsilonBound(
        model="fedavg",
        copies=10,
        epsilon=lower_bound(20, 20, coins=30, delta=1e-3, confidence=0.9),
        delta=1e-3,
        confidence=0.9,
        guesses=20,
        right=20,
        canaries=30,
        accounted=2.5,
        score="loss",
    )
    assert bound(np.zeros(1), np.array([True])).guesses == 0


@pytest.mark.parametrize(("scores", "inserted"), [([], []), ([1.0], [True, False]), ([1.0, math.nan], [True, False])])
def test_scores_that_cannot_be_judged(scores: list[float], inserted: list[bool]) -> None:
    with pytest.raises(ValueError, match="each canary"):
        epsilon_bound(scores, inserted, model="m", copies=1, delta=0.0)


def test_impossible_counts() -> None:
    with pytest.raises(ValueError, match="v = 3"):
        p_value(3, 2, coins=4, epsilon=1.0, delta=0.0)
