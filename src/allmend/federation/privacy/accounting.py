"""What noisy releases cost: ε at a given δ, by the accountants of the library `dp_accounting`.

A release is a sum to which each protected unit (a record, or a member) adds a vector of norm at most C, plus Gaussian
noise of standard deviation `noise_multiplier` · C on every coordinate. Neighbours differ by one unit added or removed;
against the exchange of one unit for another the guarantee is weaker. Releases may depend on those before them.

Sources: for sampled releases the privacy loss distribution (Koskela, Jälkö, Honkela, AISTATS 2020), discretised by
connecting the dots (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, PETS 2022), so that ε is never below the true one;
for releases without sampling the exact ε of the Gaussian mechanism (Balle & Wang, ICML 2018).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq

from allmend.errors import UserError

Unit = Literal["record", "member"]

NOISE_RANGE = (0.01, 1000.0)
"""Noise multipliers that are worth accounting: less noise counts as none, more is never chosen."""


SKELLAM_LEVELS = 2**20
"""Whole numbers from 0 to the clip, where noise is Skellam noise: so many that it costs what Gaussian noise would."""


class OutOfReachError(UserError):
    """No noise keeps a budget."""


@dataclass(frozen=True)
class Release:
    """One noisy sum.

    Attributes:
        noise_multiplier: standard deviation of the noise over the clip; 0 for none.
        rate: probability with which each unit enters the sum, by a secret coin of its own (Poisson sampling). None
            where units are chosen otherwise, or where others learn which: then nothing is counted for sampling.
        skellam: whether the noise is a Skellam distribution's on whole numbers, of which members can each add a share,
            instead of a Gaussian one's; `noise_multiplier` is then over the clip after rounding.
    """

    noise_multiplier: float
    rate: float | None = None
    skellam: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"a noise multiplier is a finite number of 0 or more, got {self.noise_multiplier}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"a sampling rate lies in (0, 1], got {self.rate}")
        if self.skellam and self.rate not in (None, 1.0):
            raise ValueError("nothing is counted for sampling where the noise is Skellam noise")


@lru_cache(maxsize=4096)
def epsilon(release: Release, times: int, delta: float) -> float:
    """ε of so many releases: 0 for none, infinite without noise. Takes well below a second.

    Below δ = 2e-15 the library's own truncation makes ε of sampled releases infinite.

    Raises:
        ValueError: a negative number of releases, or δ outside (0, 1).
    """
    if times < 0 or not 0 < delta < 1:
        raise ValueError(f"releases must be 0 or more and δ in (0, 1), got {times} and {delta}")
    if times == 0:
        return 0.0
    if release.noise_multiplier < NOISE_RANGE[0]:
        return math.inf
    if release.skellam:
        return _skellam_epsilon(release.noise_multiplier, times, delta)
    if release.rate in (None, 1.0):
        # T Gaussian releases together are one with noise σ / √T
        from dp_accounting import get_epsilon_gaussian

        return float(get_epsilon_gaussian(release.noise_multiplier / math.sqrt(times), delta))
    return float(_loss_distribution(release).self_compose(times).get_epsilon_for_delta(delta))


def _skellam_epsilon(noise: float, times: int, delta: float) -> float:
    """ε of so many Skellam releases, by Rényi divergences of whole orders α > 1.

    On one coordinate that a unit moves by Δ, under noise of variance μ, the divergence is at most
    α Δ² / (2 μ) + (2 α Δ² + 6 |Δ|) / (4 μ²); over d coordinates these add up. Here the norm of all Δ is at most Δ₂,
    which is L = `SKELLAM_LEVELS` or more, and μ = z² Δ₂²; with Σ |Δ| ≤ √d Δ₂ and d ≤ L² that is at most
    α / (2 z²) + (α + 3) / (2 z⁴ L²).

    Source of the bound: Agarwal, Kairouz, Liu, "The Skellam Mechanism for Differentially Private Federated Learning",
    NeurIPS 2021 (2 α − 1 there).
    """
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    orders = np.concatenate([np.arange(2, 128), np.arange(128, 2048, 16)])
    one = orders / (2 * noise**2) + (orders + 3) / (2 * noise**4 * SKELLAM_LEVELS**2)
    return float(compute_epsilon(orders, times * one, delta)[0])


_epsilon = epsilon
"""The same under a name that no argument hides."""


def noise_for(*, rate: float | None, times: int, epsilon: float, delta: float, skellam: bool = False) -> float:
    """The least noise multiplier in `NOISE_RANGE` with which so many releases cost no more than ε, rounded up to four
    digits.

    Args:
        rate, skellam: as in `Release`.
        times: releases.
        epsilon, delta: the budget.

    Raises:
        OutOfReachError: no multiplier of the range keeps within the budget.
    """
    least, most = NOISE_RANGE

    def cost(noise: float) -> float:
        return _epsilon(Release(noise, rate, skellam), times, delta)

    if (reachable := cost(most)) > epsilon:
        raise OutOfReachError(
            f"no noise multiplier up to {most:g} brings {times:,} releases down to ε = {epsilon:g} at δ = {delta:g}; "
            f"the smallest ε that can be reached is {_up(reachable, 3):g}",
            hint="Plan fewer releases or a smaller share in each, or allow a larger ε or δ.",
        )
    low = high = 1.0
    while cost(high) > epsilon:
        low, high = high, min(2 * high, most)
    while cost(low) <= epsilon:
        if low == least:
            return least
        low, high = max(low / 2, least), low
    root = brentq(lambda noise: math.log(max(cost(noise), 1e-9) / epsilon), low, high, xtol=3e-4 * low)
    noise = _up(root, 4)
    while cost(noise) > epsilon:
        noise = _up(noise * (1 + 1e-6), 4)
    return noise


def describe(unit: Unit) -> str:
    """What a guarantee for this unit protects, in a sentence."""
    whom, note = {
        "record": ("one training record of a client", "someone with several records is protected less"),
        "member": ("a member with all its records", "this covers each of the records too"),
    }[unit]
    return (
        f"Protects {whom}: any result of training is at most e^ε times as likely with it as without it, and the other "
        f"way round, but for a probability of δ; {note}."
    )


@lru_cache(maxsize=8)
def _loss_distribution(release: Release) -> Any:
    """The privacy loss distribution of one sampled release.

    The interval of discretisation is a twentieth of q/σ, which is the loss's standard deviation where σ is large and
    less than it elsewhere: rounding then adds less than a thousandth to ε. But it is not shorter than 1/20,000 of the
    largest loss that counts (at 10 σ), which bounds the time: for rates of about 1/10,000 or less and multipliers
    up to 1, ε comes out up to three per cent too large, and more only where it is below 0.1.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    assert release.rate is not None
    sigma, q = min(release.noise_multiplier, 1e6), release.rate  # with more noise ε stays the same 0
    largest = 1 / (2 * sigma**2) + 10 / sigma  # without sampling; with it, log(1 + q (exp(largest) − 1))
    sampled = largest + math.log(q + (1 - q) * math.exp(-largest))
    return from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=max(q / (20 * sigma), sampled / 20_000),
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _up(value: float, digits: int) -> float:
    """Rounded up to so many significant digits; infinity stays."""
    if not math.isfinite(value) or value <= 0:
        return value
    rounded = float(f"{value:.{digits - 1}e}")
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return rounded if rounded >= value else float(f"{rounded + step:.{digits - 1}e}")
