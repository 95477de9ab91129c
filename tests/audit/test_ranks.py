"""The test of planted canaries' ranks: exact under its hypothesis, one-sided, and free of what the base model knows."""

from itertools import combinations

import pytest
import torch

from allmend.audit.likelihood import Reading
from allmend.audit.ranks import rank_tests
from allmend.data.canaries import Canary
from allmend.results import AuditTable, RankTest

SCORES = (0.1, 0.9, 0.35, 0.6, 0.2, 0.75, 0.05)


def reading(value: float) -> Reading:
    values = torch.tensor([value - 1, value + 1], dtype=torch.float64)
    return Reading(torch.zeros(3, dtype=torch.long), values, values > 0, values, values, values)


def canary(place: int, *, inserted: bool, copies: int = 1) -> Canary:
    return Canary(f"c{place}", "note", "a", copies, f"text {place}", (), inserted)


def ranked(planted: tuple[int, ...], base: float = 0.0, *, sign: float = 1.0) -> RankTest:
    canaries = [canary(place, inserted=place in planted) for place in range(len(SCORES))]
    easy = [base * place for place in range(len(SCORES))]
    readings = [reading(sign * score + one) for score, one in zip(SCORES, easy, strict=True)]
    (found,) = rank_tests("local/a", "others", canaries, readings, [reading(one) for one in easy])
    return found


def test_p_is_the_share_of_coins_that_would_rank_planted_ones_as_high() -> None:
    """Against all ways in which three coins of seven could have fallen."""
    rank = sorted(SCORES).index
    ways = list(combinations(range(len(SCORES)), 3))
    for planted in ways:
        own = sum(rank(SCORES[place]) for place in planted)
        as_high = sum(sum(rank(SCORES[place]) for place in other) >= own for other in ways)
        found = ranked(planted)
        assert found.p == pytest.approx(as_high / len(ways))
        assert (found.planted, found.controls) == (3, 4)
    # so that a level is kept whatever the scores are
    for level in (0.03, 0.05, 0.2, 0.5):
        assert sum(ranked(planted).p <= level for planted in ways) <= level * len(ways)


def test_it_is_one_sided_and_takes_out_what_is_easy_for_the_base_model() -> None:
    assert ranked((1, 3, 5)).p == pytest.approx(1 / 35)
    assert ranked((1, 3, 5), sign=-1.0).p == 1
    assert ranked((1, 3, 5), base=8.0).p == pytest.approx(1 / 35)


def test_each_number_of_copies_is_tested_against_all_controls() -> None:
    canaries = [canary(0, inserted=True), canary(1, inserted=True, copies=10), canary(2, inserted=False)]
    canaries += [canary(3, inserted=False, copies=10), canary(4, inserted=False, copies=3)]
    readings, base = [reading(float(5 - place)) for place in range(5)], [reading(0.0)] * 5
    found = rank_tests("local/a", "own", canaries, readings, base)
    assert [(one.copies, one.planted, one.controls, one.p) for one in found] == [(1, 1, 3, 0.25), (10, 1, 3, 0.25)]
    assert rank_tests("local/a", "own", canaries[:2], readings[:2], base[:2]) == []
    assert rank_tests("local/a", "own", canaries[2:], readings[2:], base[2:]) == []


def test_what_is_told_of_many_models_together_is_corrected_for_their_number() -> None:
    def table(*p: float) -> AuditTable:
        tests = [
            RankTest(model=f"cobo/{place}", whose=whose, copies=1, planted=9, controls=9, p=value)
            for place, value in enumerate(p)
            for whose in ("own", "others")
        ]
        return AuditTable(extraction=(), gaps=(), canaries=9, controls=9, seed=0, ranks=tuple(tests))

    assert [test.model for test in table(0.02).above_chance("others")] == ["cobo/0"]
    assert table(0.02, 0.5, 0.9).above_chance("others") == ()
    assert [test.model for test in table(0.9, 0.01, 0.9).above_chance("own")] == ["cobo/1"]
