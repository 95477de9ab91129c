import math
import sys
from statistics import stdev

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from allmend.intervals import (
    CONFIDENCE,
    difference,
    exp_mean,
    mean,
    mean_ratio,
    mean_share,
    paired_difference,
    ratio,
    share,
)
from allmend.results import Estimate

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_shares_interval_is_wilsons(trial: tuple[int, int]) -> None:
    successes, n = trial
    found = share(successes, n)
    expected = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    assert ends(found) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (found.value, found.n) == (successes / n, n)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("n", [1, 2, 50])
def test_a_share_of_nothing_or_all_has_an_interval(n: int) -> None:
    assert share(0, n).low == 0
    assert 0 < share(0, n).high < 1
    assert share(n, n).high == 1
    assert 0 < share(n, n).low < 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (2, 1), (-1, 3)])
def test_no_share(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        share(successes, n)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_equal_shares_have_the_interval_of_as_many_trials(n: int) -> None:
    for successes in range(n + 1):
        found, trials = mean_share([successes / n] * n), share(successes, n)
        assert ends(found) == pytest.approx(ends(trials), abs=1e-12)
        assert (found.value, found.n) == (pytest.approx(successes / n), n)


@given(st.lists(st.integers(0, 5).map(lambda out: out / 5), min_size=2, max_size=12))
@example([0.2, *[0.0] * 7])
@example([0.8, *[1.0] * 7])
def test_a_mean_of_shares_has_students_interval_that_does_not_collapse_at_0_and_1(shares: list[float]) -> None:
    found, n = mean_share(shares), len(shares)
    low, high = ends(found)
    assert 0 <= low <= found.value <= high <= 1
    assert low <= ends(share(n, n))[0]
    assert high >= ends(share(0, n))[1]
    if min(shares) < max(shares):
        inner = ends(mean(shares, bounds=(0, 1)))
        assert low in (inner[0], share(n, n).low)
        assert high in (inner[1], share(0, n).high)
        assert low <= inner[0] <= inner[1] <= high


@given(VALUES.filter(lambda values: min(values) < max(values)))
def test_a_means_interval_is_students(values: list[float]) -> None:
    found = mean(values)
    scale = stats.sem(values) or 1e-300
    expected = stats.t.interval(CONFIDENCE, len(values) - 1, loc=math.fsum(values) / len(values), scale=scale)
    assert ends(found) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert found.n == len(values)


def test_an_interval_is_cut_to_what_the_values_can_be() -> None:
    low, high = ends(mean([0.0, 0.0, 0.0, 1.0]))
    assert low < 0
    assert high > 1
    assert ends(mean([0.0, 0.0, 0.0, 1.0], bounds=(0, 1))) == (0, 1)
    assert ends(mean([0.0, 0.0, 0.0, 1.0], bounds=(-5, 5))) == (low, high)


def test_a_single_value_has_no_interval() -> None:
    assert mean([3.0]) == Estimate(value=3.0, n=1)
    assert exp_mean([2.0], [4]) == Estimate(value=math.exp(0.5), n=4)
    assert difference([1.0], [2.0, 5.0]) == Estimate(value=-2.5, n=3)
    assert difference([1.0, 3.0], [2.0]) == Estimate(value=0.0, n=3)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=9))
def test_a_paired_difference_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = paired_difference(first, second)
    assert found == mean([a - b for a, b in pairs])
    if len({a - b for a, b in pairs}) > 1 and stdev([a - b for a, b in pairs]) > 1e-6:
        expected = stats.ttest_rel(first, second).confidence_interval(CONFIDENCE)
        assert ends(found) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


@given(VALUES, VALUES)
def test_a_difference_of_groups_is_welchs(first: list[float], second: list[float]) -> None:
    found = difference(first, second)
    assert found.value == pytest.approx(math.fsum(first) / len(first) - math.fsum(second) / len(second), abs=1e-6)
    assert found.n == len(first) + len(second)
    assert found.low is None or found.low <= found.value <= found.high
    if min(stdev(first), stdev(second)) > 1e-3:
        expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(CONFIDENCE)
        assert ends(found) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


def test_values_that_do_not_differ_have_no_interval() -> None:
    assert difference([2.0, 2.0], [0.5, 0.5, 0.5]) == Estimate(value=1.5, n=5)
    assert mean([2.0, 2.0]) == Estimate(value=2.0, n=2)
    assert paired_difference([1.0, 0.0], [1.0, 0.0]) == Estimate(value=0.0, n=2)


@pytest.mark.parametrize("unit", [1e-150, 1e150])
def test_a_difference_goes_with_its_unit(unit: float) -> None:
    first, second = [1.0, 2.0, 4.0], [0.0, 5.0]
    small = difference([unit * value for value in first], [unit * value for value in second])
    assert ends(small) == pytest.approx([unit * end for end in ends(difference(first, second))])


def test_a_perplexity_is_that_of_all_tokens() -> None:
    sums, counts = [2.0, 9.0, 1.0], [4, 10, 1]
    found = exp_mean(sums, counts)
    assert found.value == pytest.approx(math.exp(12 / 15))
    assert found.n == 15
    assert found.low < found.value < found.high


def test_records_whose_means_do_not_differ_have_no_interval() -> None:
    assert exp_mean([2.0, 1.0], [4, 2]) == Estimate(value=math.exp(0.5), n=6)
    assert ratio([0.3, 0.1, 0.7], [3, 1, 7]).low is None
    assert ratio([0.0, 0.0], [3, 1]) == Estimate(value=0.0, n=4)


def test_with_one_token_each_it_is_the_interval_of_the_mean() -> None:
    sums = [0.5, 2.0, 1.1, 0.7]
    assert ends(exp_mean(sums, [1] * 4)) == pytest.approx([math.exp(end) for end in ends(mean(sums))])


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.integers(1, 50)), min_size=2, max_size=9))
def test_a_difference_of_sums_over_the_same_tokens_is_that_of_their_means(
    records: list[tuple[float, float, int]],
) -> None:
    """So that its sign cannot contradict the two perplexities."""
    first, second, counts = zip(*records, strict=True)
    found = ratio([a - b for a, b in zip(first, second, strict=True)], counts)
    assert found.value == pytest.approx(ratio(first, counts).value - ratio(second, counts).value, abs=1e-9)
    assert found.low is None or ends(found)[0] <= found.value <= ends(found)[1]
    assert found.n == sum(counts)


def test_a_perplexity_too_large_for_a_float() -> None:
    assert exp_mean([1e6], [1]).value == sys.float_info.max
    found = exp_mean([1.0, 400.0], [1, 1])
    assert found.low <= found.value <= found.high == sys.float_info.max


def test_the_interval_of_a_perplexity_covers_it() -> None:
    """Records of different lengths whose tokens share a difficulty: 95 % of intervals hold the expected value."""
    trials, records = 1500, 40
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 30, (trials, records), generator=generator)
    difficulty = 2.0 + 0.5 * torch.randn(trials, records, generator=generator)
    sums = (counts * difficulty).tolist()
    hits = 0
    for these, those in zip(sums, counts.tolist(), strict=True):
        low, high = ends(exp_mean(these, those))
        hits += low <= math.exp(2.0) <= high
    # ± 3.5 standard errors of the simulation, and what the delta method errs with 40 records
    assert hits / trials == pytest.approx(0.95, abs=3.5 * math.sqrt(0.95 * 0.05 / trials) + 0.01)


@settings(max_examples=20)
@given(VALUES.filter(lambda values: min(values) < max(values)))
def test_more_of_the_same_narrows_the_interval(values: list[float]) -> None:
    low, high = ends(mean(values))
    low_4, high_4 = ends(mean(values * 4))
    assert high_4 - low_4 <= high - low + 1e-9


@pytest.mark.parametrize("empty", [lambda: mean([]), lambda: difference([], [1.0]), lambda: paired_difference([], [])])
def test_no_values(empty: object) -> None:
    with pytest.raises(ValueError, match="no values"):
        empty()  # type: ignore[operator]


def test_errors() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        exp_mean([0.0], [0])
    with pytest.raises(ValueError, match=r"longer|shorter"):
        paired_difference([1.0, 2.0], [1.0])


@given(VALUES.filter(lambda values: max(values) - min(values) > 1e-3), st.floats(0.5, 0.999))
def test_a_ratios_interval_has_the_confidence_that_is_asked_for(values: list[float], confidence: float) -> None:
    found = ratio(values, [1] * len(values), confidence=confidence)
    error = stdev(values) / math.sqrt(len(values))
    low, high = stats.t.interval(confidence, len(values) - 1, loc=sum(values) / len(values), scale=error)
    assert ends(found) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


SPREAD = VALUES.filter(lambda values: max(values) - min(values) > 1e-3)


@given(SPREAD, SPREAD)
def test_a_mean_over_two_groups_is_half_of_welchs_difference_to_the_negative(
    first: list[float], second: list[float]
) -> None:
    """(a + b) / 2 is half of a minus −b, whose interval scipy knows."""
    found = mean_ratio([(first, [1] * len(first)), (second, [1] * len(second))])
    test = stats.ttest_ind(first, [-value for value in second], equal_var=False).confidence_interval(CONFIDENCE)
    assert ends(found) == pytest.approx((test.low / 2, test.high / 2), rel=1e-6, abs=1e-6)
    assert found.n == len(first) + len(second)


@given(SPREAD, st.integers(1, 9))
def test_a_mean_over_one_group_is_its_ratio(values: list[float], tokens: int) -> None:
    found, alone = (
        made for made in (mean_ratio([(values, [tokens] * len(values))]), ratio(values, [tokens] * len(values)))
    )
    assert ends(found) == pytest.approx(ends(alone), rel=1e-9, abs=1e-9)
    assert (found.value, found.n) == (pytest.approx(alone.value), alone.n)


def test_groups_count_alike_however_many_tokens_they_have() -> None:
    assert mean_ratio([([10.0, 12.0], [1, 1]), ([300.0, 100.0], [100, 100])]).value == pytest.approx((11 + 2) / 2)


def test_a_group_of_one_record_leaves_no_interval_and_one_of_no_difference_does() -> None:
    spread = ([1.0, 2.0, 4.0], [1, 1, 1])
    assert mean_ratio([spread, ([3.0], [1])]).low is None
    assert mean_ratio([spread, ([2.0, 2.0], [1, 1])]).low is None  # equal values tell nothing of their spread
    same = mean_ratio([spread, ([0.0, 0.0], [1, 1])])  # a model minus itself
    alone = mean_ratio([spread])
    assert ends(same) == pytest.approx((alone.low / 2, alone.high / 2))  # type: ignore[operator]
    assert mean_ratio([([0.0, 0.0], [1, 1])]).low is None


def test_no_groups() -> None:
    with pytest.raises(ValueError, match="no groups"):
        mean_ratio([])
    with pytest.raises(ValueError, match="no tokens"):
        mean_ratio([([1.0], [1]), ([0.0], [0])])
