"""Halves of a target, and the rank correlation of what they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from allmend.influence.reliability import SPLITS, agreement, halves, rank_correlation


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=12), st.integers(0, 9))
def test_each_split_has_every_record_of_a_group_once_in_halves_of_a_size(groups: list[str], seed: int) -> None:
    found = halves(groups, seed=seed)
    for group in set(groups):
        members = [place for place, other in enumerate(groups) if other == group]
        for split in range(SPLITS if len(members) > 1 else 0):
            sides = [[place for place in members if f"{group}/{split}/{half}" in found[place]] for half in (0, 1)]
            assert sorted(sides[0] + sides[1]) == members
            assert abs(len(sides[0]) - len(sides[1])) <= 1
    assert all(groups[place] in names for place, names in enumerate(found))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=0, max_size=12))
def test_the_correlation_is_that_of_ranks_or_none(pairs: list[tuple[int, int]]) -> None:
    first, second = (torch.tensor([float(pair[side]) for pair in pairs]) for side in (0, 1))
    found = rank_correlation(first, second)
    if len(set(first.tolist())) < 2 or len(set(second.tolist())) < 2:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic)


def test_halves_that_say_the_same_agree_and_a_single_record_has_none() -> None:
    names = ["g", *(f"g/{split}/{half}" for split in range(SPLITS) for half in (0, 1))]
    column = torch.arange(6.0)
    same = torch.stack([column] * len(names), 1)
    found = agreement(names, same, "g")
    assert found is not None
    assert found.value == pytest.approx(1)
    against = torch.stack([-column if name.endswith("/1") else column for name in names], 1)
    found = agreement(names, against, "g")
    assert found is not None
    assert found.value == pytest.approx(-1)
    assert agreement(["g"], column[:, None], "g") is None
