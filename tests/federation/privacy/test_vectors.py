"""Replies as vectors of integers: what comes back is what plain sums give, to the width of a step."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from allmend.federation.privacy.accounting import SKELLAM_LEVELS
from allmend.federation.privacy.secure_sum import SecureMember, SecureSum, Terms
from allmend.federation.privacy.vectors import LARGEST_NUMBER, VectorCode
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.private_fedavg import PrivateFedAvg
from allmend.learn.noise import NoiseSource, noise_source
from allmend.recipe import SecureAggregation
from allmend.strategy import Reply, Sums

LAYOUT = {"update/b": torch.Size([2, 3]), "update/a": torch.Size([4]), "blocks/c": torch.Size([])}


def code(members: int = 5, **options: Any) -> VectorCode:
    return VectorCode(LAYOUT, ("weight", "loss"), clip=100.0, members=members, **options)


def uniform(seed: int) -> NoiseSource:
    return noise_source("seeded", seed, "test")


def reply(seed: int, *, without: str | None = None) -> Reply:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 10 * torch.randn(shape, generator=generator) for name, shape in LAYOUT.items() if name != without}
    return Reply(tensors, {"weight": float(seed + 1), "loss": 2.5 * seed})


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=5), st.sampled_from([None, *LAYOUT]))
def test_a_sum_of_vectors_is_the_sum_of_the_replies(seeds: list[int], without: str | None) -> None:
    replies = [reply(seed, without=without if place == 0 else None) for place, seed in enumerate(seeds)]
    plain = Sums()
    for one in replies:
        plain.add(one)
    vectors = [code().encode(one, uniform(place))[0] for place, one in enumerate(replies)]
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    found = code().decode(total, len(replies))
    assert found.members == plain.members
    step = code().of_tensors.step
    for name in LAYOUT:
        expected = plain[name] if name in plain else torch.zeros(LAYOUT[name])
        torch.testing.assert_close(found[name], expected.double(), rtol=0, atol=len(seeds) * step)
    assert found.fact("weight") == plain.fact("weight")  # whole numbers are exact
    assert found.fact("loss") == pytest.approx(plain.fact("loss"), abs=len(seeds) * code().of_numbers.step)


def test_steps_are_fine_enough_for_weights_and_changes() -> None:
    """A change of a parameter times a million records, and a loss times as many."""
    many = VectorCode(LAYOUT, ("weight",), clip=1e6, members=1000)
    assert many.of_tensors.step < 1e-5
    assert LARGEST_NUMBER > 1e8
    assert many.of_numbers.step <= 2.0**-12


def test_values_that_do_not_fit_are_cut_and_counted() -> None:
    one = Reply({"update/a": torch.tensor([1e9, -1e9, 99.0, 0.0])}, {"weight": 2.0**30})
    vector, cut = code().encode(one, uniform(0))
    assert cut == 3
    found = code().decode(vector, 1)
    torch.testing.assert_close(found["update/a"], torch.tensor([100.0, -100.0, 99.0, 0.0]).double(), rtol=0, atol=1e-6)
    assert found.fact("weight") == LARGEST_NUMBER
    assert found.cut == 3


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Reply({"update/x": torch.zeros(1)}), "'update/x' has no place"),
        (Reply({}, {"count": 1.0}), "'count' has no place"),
        (Reply({"update/a": torch.zeros(5)}), r"'update/a' has shape \(5,\), and the sum has \(4,\)"),
        (Reply({"update/a": torch.full((4,), torch.nan)}), "'update/a' holds NaN"),
        (Reply({}, {"weight": float("inf")}), "number 'weight' is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Reply, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        code().encode(wrong, uniform(0))


def test_behind_masks_it_is_the_same_sum_to_the_bit() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    keys = {f"m{place}": Ed25519PrivateKey.generate() for place in range(4)}
    vectors = {name: code(4).encode(reply(place), uniform(place))[0] for place, name in enumerate(keys)}
    public = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    terms = Terms(session="s", members=public, length=code().length, bits=64)
    total, members = SecureSum(terms), {name: SecureMember(terms, name, key) for name, key in keys.items()}
    told: dict[str, bytes] = dict.fromkeys(members, b"")
    for phase in ("keys", "shares", "masked", "opened"):
        for name in told:
            arguments = ([told[name]] if phase != "keys" else []) + ([vectors[name]] if phase == "masked" else [])
            total.receive(name, getattr(members[name], phase)(*arguments))
        told = total.advance()
    assert total.total is not None
    hidden = code(4).decode(total.total, 4)
    open_ = code(4).decode(sum(list(vectors.values())[1:], next(iter(vectors.values()))), 4)
    for name in LAYOUT:
        assert torch.equal(hidden[name], open_[name])


PRIVATE = PrivateFedAvg(clip=0.5, noise_multiplier=2.0, distributed=True)


def private_code(fewest: int = 4) -> VectorCode:
    return VectorCode.of(PRIVATE, {"a": torch.zeros(300, 100)}, SecureAggregation(fewest=fewest), members=8)


def test_a_guarantees_sum_lies_on_a_grid_of_the_clip_and_shares_make_up_its_noise() -> None:
    code = private_code()
    assert code.of_tensors.step == pytest.approx(0.5 / SKELLAM_LEVELS)
    norm = SKELLAM_LEVELS + math.sqrt(30_000)
    assert code.noise * 4 == pytest.approx((2.0 * norm) ** 2)
    assert private_code(8).noise == pytest.approx(code.noise / 2)
    assert VectorCode.of(FedAvg(), {"a": torch.zeros(2)}, SecureAggregation(), members=8).noise == 0


@pytest.mark.parametrize("members", [4, 8])
def test_the_sum_has_the_noise_that_is_accounted_for_or_more(members: int) -> None:
    """With as few members as may be, it is the noise multiplier over the clip; with more, more."""
    code, total = private_code(), np.zeros(30_001, dtype=np.uint64)
    for member in range(members):
        vector, cut = code.encode(Reply({"update/a": torch.full((300, 100), 0.001)}), uniform(member))
        assert cut == 0
        total += vector
    noise = code.decode(total, members)["update/a"].numpy() - 0.001 * members
    deviation = 2.0 * 0.5 * math.sqrt(members / 4)
    assert abs(noise.mean()) < 5 * deviation / math.sqrt(30_000)
    assert noise.std() == pytest.approx(deviation, rel=0.03)
    assert kstest(noise.flatten() / deviation, "norm").pvalue > 1e-6


def test_a_change_at_the_clip_stays_within_the_norm_that_is_accounted_for() -> None:
    """Whatever direction it has: rounding adds less than one to each of its coordinates."""
    code = replace(private_code(), noise=0.0)
    for seed in range(5):
        change = random_unit(30_000, seed) * 0.5 * (1 - 1e-12)
        vector, _ = code.encode(Reply({"update/a": change.view(300, 100)}), uniform(seed))
        norm = np.linalg.norm(vector[:30_000].view(np.int64).astype(float))
        assert SKELLAM_LEVELS * 0.99 < norm <= SKELLAM_LEVELS + math.sqrt(30_000)


def random_unit(size: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if seed == 0:
        drawn = torch.zeros(size, dtype=torch.float64)
        drawn[0] = 1.0  # all in one place
    return drawn / drawn.norm()
