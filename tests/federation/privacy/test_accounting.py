import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm, skellam

from allmend.errors import UserError
from allmend.federation.privacy.accounting import NOISE_RANGE, Release, describe, epsilon, noise_for

DELTA = 1e-5


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """ε of the Gaussian mechanism with sensitivity 1 (Balle & Wang, ICML 2018, theorem 8)."""

    def delta_at(e: float) -> float:
        return norm.cdf(1 / (2 * sigma) - e * sigma) - math.exp(e) * norm.cdf(-1 / (2 * sigma) - e * sigma)

    return brentq(lambda e: delta_at(e) - delta, 0, 500) if delta_at(0) > delta else 0.0


def sampled_delta(sigma: float, q: float, e: float) -> float:
    """δ of one sampled Gaussian release: the larger hockey-stick divergence of its two output densities.

    They are P = (1 − q) N(0, σ²) + q N(1, σ²) with the unit and Q = N(0, σ²) without; P/Q grows with the output.
    """

    def crossing(ratio: float) -> float:
        return 0.5 + sigma**2 * math.log((ratio - 1 + q) / q) if ratio > 1 - q else -math.inf

    def with_unit(x: float) -> float:  # P[output ≥ x]
        return (1 - q) * norm.sf(x / sigma) + q * norm.sf((x - 1) / sigma)

    up, down = crossing(math.exp(e)), crossing(math.exp(-e))
    remove = with_unit(up) - math.exp(e) * norm.sf(up / sigma)
    add = norm.cdf(down / sigma) - math.exp(e) * (1 - with_unit(down))
    return max(remove, add)


@given(st.floats(0.5, 30), st.integers(1, 100), st.sampled_from([1e-9, 1e-5, 1e-2]))
@settings(deadline=None)
def test_without_sampling_it_is_the_gaussian_mechanisms(noise: float, times: int, delta: float) -> None:
    expected = gaussian_epsilon(noise / math.sqrt(times), delta)
    assert epsilon(Release(noise), times, delta) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert epsilon(Release(noise, 1.0), times, delta) == epsilon(Release(noise), times, delta)


@pytest.mark.parametrize(("noise", "rate"), [(0.3, 0.5), (0.7, 0.01), (1.0, 0.2), (3.0, 0.9), (1.0, 0.001)])
@pytest.mark.parametrize("delta", [1e-7, 1e-3])
def test_one_sampled_release_has_its_exact_price(noise: float, rate: float, delta: float) -> None:
    found = epsilon(Release(noise, rate), 1, delta)
    if sampled_delta(noise, rate, 0.0) <= delta:
        assert found < 1e-3
        return
    exact = brentq(lambda e: sampled_delta(noise, rate, e) - delta, 0, 100)
    assert exact - 1e-9 <= found <= exact * 1.005


@pytest.mark.parametrize(("noise", "rate", "times"), [(1.1, 0.01, 1000), (0.6, 0.05, 100), (5.0, 0.3, 50)])
def test_sampled_releases_agree_with_opacus(noise: float, rate: float, times: int) -> None:
    """Its accountant bounds its own error: ε lies within 0.01 below what it returns, at about the same δ."""
    opacus = PRVAccountant()
    opacus.history = [(noise, rate, times)]
    assert epsilon(Release(noise, rate), times, DELTA) == pytest.approx(opacus.get_epsilon(DELTA), abs=0.02)


def test_a_published_value() -> None:
    """Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, section 3.2: q = 0.01, σ = 4, T = 10,000 and
    δ = 1e-5 cost 1.26 by the moments accountant. A privacy loss distribution is tighter, and still no less than an
    optimistic one."""
    q, sigma, times = 0.01, 4.0, 10_000
    moments = RdpAccountant(list(range(2, 65)))
    moments.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), times)
    by_order = zip(moments.rdp, moments.orders, strict=True)
    published = min(rdp + math.log(1 / DELTA) / (order - 1) for rdp, order in by_order)
    assert f"{published:.2f}" == "1.26"
    optimistic = from_gaussian_mechanism(sigma, sampling_prob=q, pessimistic_estimate=False, use_connect_dots=False)
    below = optimistic.self_compose(times).get_epsilon_for_delta(DELTA)
    assert 0 < below < epsilon(Release(sigma, q), times, DELTA) < moments.get_epsilon(DELTA) < published


@given(st.floats(0.5, 20), st.floats(0.002, 0.9), st.integers(1, 400))
@settings(deadline=None, max_examples=8)
def test_directions(noise: float, rate: float, times: int) -> None:
    spent = epsilon(Release(noise, rate), times, DELTA)
    assert spent <= epsilon(Release(noise, rate), times + 1, DELTA)
    assert spent <= epsilon(Release(noise, rate), times, DELTA / 2)
    assert spent <= epsilon(Release(noise * 0.98, rate), times, DELTA)
    assert spent <= epsilon(Release(noise), times, DELTA) * 1.001


def test_ends() -> None:
    assert epsilon(Release(1.0, 0.1), 0, DELTA) == epsilon(Release(0.0), 0, DELTA) == 0
    assert epsilon(Release(0.0, 0.1), 1, DELTA) == math.inf
    assert epsilon(Release(1e-9, 0.1), 1, DELTA) == math.inf  # too little noise to count
    assert epsilon(Release(1e300, 0.1), 1, DELTA) == 0
    assert epsilon(Release(1.0, 0.1), 1, 1e-20) == math.inf  # beyond what the library resolves


@pytest.mark.parametrize("release", [(-1.0, None), (math.inf, None), (math.nan, 0.5), (1.0, 0.0), (1.0, 1.1)])
def test_impossible_releases(release: tuple[float, float | None]) -> None:
    with pytest.raises(ValueError, match="got"):
        Release(*release)


@pytest.mark.parametrize(("times", "delta"), [(-1, DELTA), (1, 0.0), (1, 1.0), (1, math.nan)])
def test_impossible_questions(times: int, delta: float) -> None:
    with pytest.raises(ValueError, match="got"):
        epsilon(Release(1.0), times, delta)


@pytest.mark.parametrize(("rate", "target"), [(None, 0.3), (None, 300.0), (0.02, 3.0), (0.5, 0.3), (0.5, 300.0)])
def test_the_noise_for_a_budget_is_the_least(rate: float | None, target: float) -> None:
    times = 30
    noise = noise_for(rate=rate, times=times, epsilon=target, delta=DELTA)
    assert epsilon(Release(noise, rate), times, DELTA) <= target
    assert epsilon(Release(noise * 0.998, rate), times, DELTA) > target
    assert float(f"{noise:.3e}") == noise  # what is printed with four digits keeps within the budget too


def test_the_noise_never_costs_a_trifle_too_much() -> None:
    for step in range(60):
        noise = round(1.1 + 0.137 * step, 3)
        target = epsilon(Release(noise), 9, DELTA) * (1 - 1e-9)  # so that this multiplier just misses it
        assert noise < noise_for(rate=None, times=9, epsilon=target, delta=DELTA) <= noise + 0.002


def test_the_noise_without_sampling_has_a_closed_form() -> None:
    noise = noise_for(rate=None, times=25, epsilon=1.0, delta=DELTA)
    one = brentq(lambda sigma: gaussian_epsilon(sigma, DELTA) - 1.0, 0.1, 100)
    assert 5 * one <= noise <= 5 * one * 1.0015


def test_a_budget_that_no_noise_keeps() -> None:
    with pytest.raises(UserError, match="no noise multiplier") as error:
        noise_for(rate=None, times=10**6, epsilon=1.0, delta=1e-9)
    reachable = epsilon(Release(NOISE_RANGE[1]), 10**6, 1e-9)
    named = float(error.value.what.split()[-1])
    assert reachable <= named <= reachable * 1.01
    assert error.value.hint is not None
    assert noise_for(rate=None, times=10**6, epsilon=named, delta=1e-9) <= NOISE_RANGE[1]


def test_a_budget_that_hardly_any_noise_keeps() -> None:
    assert noise_for(rate=None, times=1, epsilon=1e9, delta=DELTA) == NOISE_RANGE[0]


def test_words_name_the_unit() -> None:
    assert "one training record" in describe("record")
    assert "a member with all its records" in describe("member")


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.8, 0.5), (2.0, 0.05)])
@pytest.mark.parametrize("rounds", [10, 200])
def test_flowers_accountant_is_never_below_and_not_far_above(noise: float, rate: float, rounds: int) -> None:
    """It accounts for the same sampled Gaussian by Rényi divergences, which bound ε from above."""
    flower = pytest.importorskip("flwr.supercore.privacy_accounting")
    from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant as FlowersAccountant

    population = 1000
    accountant = FlowersAccountant(
        flower.PrivacyConfig(
            target_delta=DELTA,
            population_size=population,
            neighboring_relation=flower.NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=flower.SamplingMethod.POISSON,
        )
    )
    event = flower.GaussianPrivacyEvent(
        noise_multiplier=noise, sample_size=round(rate * population), population_size=population
    )
    accountant.compose(event, rounds)
    theirs, ours = accountant.get_epsilon(DELTA), epsilon(Release(noise, rate), rounds, DELTA)
    assert ours <= theirs
    assert theirs < 1.35 * ours


@pytest.mark.parametrize("order", [2, 3, 8, 32])
@pytest.mark.parametrize("variance", [30.0, 400.0])
@pytest.mark.parametrize("shift", [1, 3, 20])
def test_the_bound_on_skellam_noise_holds_for_its_probabilities(order: int, variance: float, shift: int) -> None:
    """The Rényi divergence of shifted Skellam noise, summed over its values, against the bound of one coordinate."""
    reach = int(12 * math.sqrt(variance)) + 40 * shift
    values = np.arange(-reach, reach + 1)
    here = skellam.logpmf(values, variance / 2, variance / 2)
    there = skellam.logpmf(values - shift, variance / 2, variance / 2)
    known = np.isfinite(here) & np.isfinite(there)
    divergence = logsumexp(order * there[known] - (order - 1) * here[known]) / (order - 1)
    bound = order * shift**2 / (2 * variance) + (2 * order * shift**2 + 6 * shift) / (4 * variance**2)
    assert divergence <= bound
    if order * shift <= variance / 10:  # it is no idle bound where it is used
        assert divergence >= 0.9 * order * shift**2 / (2 * variance)


@given(st.floats(0.5, 30), st.integers(1, 100), st.sampled_from([1e-9, 1e-5, 1e-2]))
@settings(deadline=None, max_examples=40)
def test_skellam_noise_costs_what_gaussian_noise_costs_and_a_little_more(
    noise: float, times: int, delta: float
) -> None:
    gaussian, found = (epsilon(Release(noise, skellam=kind), times, delta) for kind in (False, True))
    assert gaussian <= found + 1e-9
    if 0.1 < gaussian < 20:
        assert found < 1.3 * gaussian + 0.1


def test_noise_for_a_budget_of_skellam_releases_is_enough() -> None:
    needed = noise_for(rate=None, times=10, epsilon=4.0, delta=1e-5, skellam=True)
    assert 3.9 < epsilon(Release(needed, skellam=True), 10, 1e-5) <= 4.0


def test_nothing_is_counted_for_sampling_under_skellam_noise() -> None:
    with pytest.raises(ValueError, match="nothing is counted for sampling"):
        Release(1.0, 0.5, skellam=True)
