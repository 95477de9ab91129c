"""Random numbers: their distribution against scipy's, and what makes them the same or different."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from allmend.learn.noise import NoiseSource, Randomness, _log_poisson, _poisson, keyed_source, noise_source

KINDS: tuple[Randomness, ...] = ("seeded", "secure")

# the secure source gives other numbers each time: this is how often a sound one fails
RARE = 1e-6


@pytest.mark.parametrize("randomness", KINDS)
def test_normal_numbers_are_normal_and_independent(randomness: Randomness) -> None:
    drawn = noise_source(randomness, 7, "test").normal((100_000,))
    assert drawn.dtype == torch.float64
    values = drawn.numpy()
    assert stats.kstest(values, "norm").pvalue > RARE
    assert stats.kstest(np.abs(values[np.abs(values) > 3]) - 3, _beyond_three).pvalue > RARE  # the tails
    # Box and Muller make one number of either half from the same two uniform ones
    first, second = values[:50_000], values[50_000:]
    for a, b in ((first, second), (values[:-1], values[1:]), (first**2, second**2)):
        assert abs(stats.pearsonr(a, b).statistic) < 5 / math.sqrt(len(a))


def _beyond_three(x: np.ndarray) -> np.ndarray:
    return 1 - stats.norm.sf(3 + x) / stats.norm.sf(3)


@pytest.mark.parametrize("randomness", KINDS)
def test_uniform_numbers_are_uniform(randomness: Randomness) -> None:
    drawn = noise_source(randomness, 7, "test").uniform(100_000)
    assert drawn.dtype == torch.float64
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > RARE
    bits = (drawn * 2**53).long()
    assert torch.equal(bits.double(), drawn * 2**53)  # multiples of 2⁻⁵³ …
    for bit in range(53):  # … of which every bit is a coin
        heads = int((bits >> bit & 1).sum())
        assert stats.binomtest(heads, 100_000).pvalue > RARE


def test_the_ends_of_the_uniform_numbers_give_finite_normal_ones() -> None:
    lowest = NoiseSource(lambda count: np.zeros(count, dtype=np.uint64))
    highest = NoiseSource(lambda count: np.full(count, 2**64 - 1, dtype=np.uint64))
    assert lowest.normal((2,)).tolist() == [0.0, 0.0]
    assert highest.uniform(1).item() == 1 - 2**-53
    assert highest.normal((1,)).item() == pytest.approx(math.sqrt(2 * 53 * math.log(2)))


@given(st.lists(st.integers(0, 5), max_size=3))
def test_any_shape(shape: list[int]) -> None:
    drawn = noise_source("seeded", 0).normal(shape)
    assert list(drawn.shape) == shape
    assert len(set(drawn.flatten().tolist())) == drawn.numel()


def test_the_same_seed_and_purpose_give_the_same_numbers_and_nothing_else_does() -> None:
    purposes = [
        (0,),
        (1,),
        (0, "a"),
        (0, "a", 1),
        (0, "a", 11),
        (0, "a1", 1),
        (0, "a", 1, 1),
        (0, "b", 1),
        (2**40, "a"),
    ]
    made = [noise_source("seeded", *purpose).normal((8,)) for purpose in purposes]
    again = [noise_source("seeded", *purpose).normal((8,)) for purpose in purposes]
    assert all(torch.equal(first, second) for first, second in zip(made, again, strict=True))
    assert len({tuple(numbers.tolist()) for numbers in made}) == len(purposes)
    source = noise_source("seeded", 0)
    assert not torch.equal(source.normal((8,)), source.normal((8,)))


def test_secure_numbers_do_not_come_again_and_need_no_generator_of_torch() -> None:
    state = torch.get_rng_state()
    made = [noise_source("secure", 0, "a").normal((8,)) for _ in range(2)]
    assert not torch.equal(*made)
    noise_source("seeded", 0).normal((8,))
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_do_not_repeat_each_other() -> None:
    """Keys of 128 bits: among many steps no two have the same noise."""
    first = [noise_source("seeded", n, "noise", step).uniform(1).item() for n in range(40) for step in range(500)]
    assert len(set(first)) == 20_000


@pytest.mark.parametrize("mean", [100.0, 137.5, 1234.5])
def test_poisson_numbers_have_the_probabilities_of_poisson_numbers(mean: float) -> None:
    count, deviation = 400_000, math.sqrt(mean)
    drawn = _poisson(noise_source("seeded", 3, "poisson", int(mean)), count, mean) + math.floor(mean)
    low, high = int(mean - 4 * deviation), int(mean + 4 * deviation)
    observed = np.bincount(np.clip(drawn, low - 1, high + 1) - low + 1, minlength=high - low + 3)
    inner = stats.poisson.pmf(np.arange(low, high + 1), mean)
    expected = count * np.array([stats.poisson.cdf(low - 1, mean), *inner, stats.poisson.sf(high, mean)])
    assert stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue > 1e-4


@pytest.mark.parametrize("mean", [100.0, 1e4, 2.0**20, 2.0**45])
def test_the_probability_of_a_poisson_number_keeps_its_digits(mean: float) -> None:
    """Against scipy where that has the digits, and at 2⁴⁵ against the normal density, which is as near there."""
    whole = math.floor(mean)
    offset = np.linspace(-6, 6, 41) * math.sqrt(mean)
    offset = np.floor(offset)
    found = _log_poisson(offset, whole, mean)
    if mean < 2**30:
        np.testing.assert_allclose(found, stats.poisson.logpmf(offset + whole, mean), atol=1e-7)
    else:
        t = (offset + whole - mean) / math.sqrt(mean)
        np.testing.assert_allclose(found, -(t**2) / 2 - 0.5 * math.log(2 * math.pi * mean), atol=1e-4)


@pytest.mark.parametrize("variance", [200.0, 2.0**20, 2.0**44, 2.0**78])
def test_skellam_numbers_have_their_moments_and_shares_add_up(variance: float) -> None:
    one = noise_source("seeded", 1, "one").skellam(200_000, variance) / math.sqrt(variance)
    assert abs(one.mean()) < 5 / math.sqrt(200_000)
    assert one.var() == pytest.approx(1, abs=5 * math.sqrt(2 / 200_000))
    assert stats.kurtosis(one) == pytest.approx(1 / variance, abs=0.06)
    if variance / 4 >= 200:
        shares = [noise_source("seeded", 2, part).skellam(200_000, variance / 4) for part in range(4)]
        assert (sum(shares) / math.sqrt(variance)).var() == pytest.approx(1, abs=5 * math.sqrt(2 / 200_000))


@pytest.mark.parametrize("variance", [0.0, 199.0, 2.0**81, math.nan])
def test_a_variance_that_the_sampler_cannot_have(variance: float) -> None:
    with pytest.raises(ValueError, match="variance must lie"):
        noise_source("seeded", 1).skellam(1, variance)


def test_a_keyed_source_gives_the_same_for_its_key_and_purpose_alone() -> None:
    draws = {
        (key, purpose): keyed_source(key, purpose).uniform(20_000).numpy().tobytes()
        for key in (bytes(32), bytes(31) + b"\1")
        for purpose in ("a", "b")
    }
    assert len(set(draws.values())) == 4
    assert keyed_source(bytes(32), "a").uniform(20_000).numpy().tobytes() == draws[bytes(32), "a"]
    assert stats.kstest(keyed_source(bytes(32), "a").uniform(20_000).numpy(), "uniform").pvalue > 1e-4
