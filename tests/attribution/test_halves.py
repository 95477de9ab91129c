"""Halves: half of everything and of each client, by chance, and the same by the same seed."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from allmend.attribution.halves import balanced_half


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=40), st.text(max_size=4))
def test_it_is_half_of_all_and_of_each_client_but_for_one(owners: list[str], seed: str) -> None:
    half = balanced_half(owners, seed=seed)
    assert half == sorted(set(half)) == balanced_half(owners, seed=seed)
    assert set(half) <= set(range(len(owners)))
    assert abs(2 * len(half) - len(owners)) <= 1
    within = Counter(owners[place] for place in half)
    for owner, count in Counter(owners).items():
        assert abs(2 * within[owner] - count) <= 1


def test_every_record_is_as_likely_as_another() -> None:
    owners = ["a"] * 5 + ["b"] * 4 + ["c"]
    drawn = Counter(place for seed in range(2000) for place in balanced_half(owners, seed=str(seed)))
    assert all(abs(drawn[place] / 2000 - 0.5) < 0.05 for place in range(10))
    # two records of a client are together less often than apart, as in any half, but by chance
    both = sum({0, 1} <= set(balanced_half(owners, seed=str(seed))) for seed in range(2000)) / 2000
    assert 0.15 < both < 0.27
