import math
import zlib
from statistics import NormalDist, fmean

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_curve
from transformers import LlamaForCausalLM

from allmend.audit.likelihood import Reading, read_texts
from allmend.audit.membership import SCORES, auc, membership_rows, refusals, scores, true_positive_rate
from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.data.records import Record

Rng = np.random.Generator
Floats = np.ndarray


def rng(seed: int = 0) -> Rng:
    return np.random.default_rng(seed)


def normal(generator: Rng, n: int, *, mean: float = 0, digits: int = 9) -> list[float]:
    return [round(float(value), digits) for value in generator.normal(mean, size=n)]


def reading(
    *log_likelihood: float, mean: float = -2.0, deviation: float = 1.0, ids: tuple[int, ...] | None = None
) -> Reading:
    values = torch.tensor(log_likelihood, dtype=torch.float64)
    tokens = torch.arange(len(values) + 1) if ids is None else torch.tensor(ids)
    same = torch.ones_like(values)
    return Reading(tokens, values, values > -1, mean * same, deviation * same, values)


# scores


def test_scores_are_those_of_their_papers() -> None:
    values = [-1.0, -5.0, -0.5, -3.0, -7.0, -0.1, -2.0, -4.0, -0.2, -6.0, -0.3]  # 20 % of 11 is 2 tokens
    text = "some text some text some text"
    found = scores(reading(*values, mean=-2.5, deviation=0.5), text, base=reading(*[-3.0] * 11))
    assert found == pytest.approx(
        {
            "loss": sum(values) / 11,
            "ratio": sum(values) / 11 + 3,
            "min-k": (-7 - 6) / 2,
            "min-k++": ((-7 + 2.5) / 0.5 + (-6 + 2.5) / 0.5) / 2,
            "zlib": sum(values) / len(zlib.compress(text.encode())),
        }
    )
    assert set(found) == set(SCORES)
    assert set(scores(reading(*values), text)) == set(SCORES) - {"ratio"}


def test_each_token_is_standardised_by_its_own_distribution() -> None:
    values, mean, deviation = (torch.tensor(one, dtype=torch.float64) for one in ([-1, -9], [-1, -8.5], [0.1, 4]))
    one = Reading(torch.arange(3), values, values > 0, mean, deviation, values)
    assert scores(one, "text")["min-k++"] == pytest.approx(-0.5 / 4)
    assert scores(one, "text")["min-k"] == -9


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=40))
def test_bounds_of_scores(values: list[float]) -> None:
    found = scores(reading(*values, mean=0.0), "text", base=reading(*values))
    assert min(values) - 1e-9 <= found["min-k"] <= found["loss"] + 1e-9 <= max(values) + 2e-9
    assert found["ratio"] == 0
    assert found["min-k++"] == found["min-k"]  # mean 0, deviation 1


def test_a_token_that_is_certain_is_neither_member_nor_not() -> None:
    found = scores(reading(0.0, 0.0, mean=0.0, deviation=0.0), "text")
    assert found["min-k++"] == 0
    assert math.isfinite(scores(reading(0.0, -90.0, mean=0.0, deviation=0.0), "text")["min-k++"])


def test_texts_without_a_score() -> None:
    with pytest.raises(ValueError, match="without predicted tokens"):
        scores(reading(), "")
    with pytest.raises(ValueError, match="another text"):
        scores(reading(-1.0, -2.0), "ab", base=reading(-1.0, -2.0, ids=(5, 6, 7)))


def test_all_scores_are_larger_of_what_was_learnt(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    encoded = [encoder.for_evaluation(Record(canary.id, text=canary.text)) for canary in canaries]
    before, after = (read_texts(models[state], encoded) for state in ("untouched", "by heart"))
    groups: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for canary, base, one in zip(canaries, before, after, strict=True):
        groups[canary.inserted].append(scores(one, canary.text, base=base))
    rows = membership_rows(
        "fedavg", records="canaries", copies=None, members=groups[True], non_members=groups[False], seed=0
    )
    assert [row.score for row in rows] == list(SCORES)
    assert [row.auc.value for row in rows] == [1] * 5


# figures

GROUP = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=25)


@given(GROUP, GROUP)
def test_auc_is_the_share_of_pairs_in_order(members: list[float], others: list[float]) -> None:
    found = auc(members, others, generator=rng())
    pairs = [(a > b) + (a == b) / 2 for a in members for b in others]
    assert found.value == pytest.approx(fmean(pairs))
    assert found.n == len(members) + len(others)
    assert (found.low is None) == (found.high is None)
    if found.low is not None:
        assert 0 <= found.low < found.high <= 1


@given(GROUP, st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=25), st.integers(2, 12))
def test_a_true_positive_rate_is_the_best_of_all_thresholds(
    members: list[float], others: list[float], one_in: int
) -> None:
    found = true_positive_rate(members, others, one_in=one_in, generator=rng())
    if len(others) < one_in:
        assert found is None
        return
    assert found is not None
    # false positives ≤ others / one_in, in whole numbers
    best = max(
        sum(score >= threshold for score in members)
        for threshold in (*members, *others, math.inf)
        if one_in * sum(score >= threshold for score in others) <= len(others)
    )
    assert found.value == best / len(members)
    assert found.n == len(members)


def test_a_true_positive_rate_lies_on_sklearns_roc_curve() -> None:
    generator = rng()
    members, others = normal(generator, 300, mean=1, digits=1), normal(generator, 2000, digits=1)
    false, true, _ = roc_curve([1] * 300 + [0] * 2000, members + others, drop_intermediate=False)
    for one_in in (10, 100, 1000):
        found = true_positive_rate(members, others, one_in=one_in, generator=generator)
        assert found is not None
        assert found.value == pytest.approx(true[false <= 1 / one_in].max())


def test_the_auc_of_two_normal_groups_is_the_closed_form() -> None:
    generator = rng()
    found = auc(normal(generator, 2000, mean=1), normal(generator, 2000), generator=generator)
    assert found.low < NormalDist().cdf(1 / math.sqrt(2)) < found.high


@pytest.mark.parametrize(("sign", "value"), [(1, 1.0), (-1, 0.0)])
def test_perfect_separation(sign: int, value: float) -> None:
    members, others = [sign * (5.0 + i) for i in range(10)], [float(i) / 100 for i in range(150)]
    area = auc(members, others, generator=rng())
    rate = true_positive_rate(members, others, one_in=100, generator=rng())
    assert area.value == rate.value == value
    assert area.low is area.high is rate.low is rate.high is None  # all resamples agree


def test_no_interval_rests_on_one_text() -> None:
    assert auc([0.0], normal(rng(), 200), generator=rng()).low is None
    assert auc(normal(rng(), 200), [0.0], generator=rng()).low is None
    assert true_positive_rate([0.0], normal(rng(), 200), one_in=2, generator=rng()).low is None


def test_no_curve_without_both_groups() -> None:
    for members, others in (([], [1.0]), ([1.0], []), ([], [])):
        with pytest.raises(ValueError, match="no ROC curve"):
            auc(members, others, generator=rng())
    assert true_positive_rate([], [0.0] * 100, one_in=100, generator=rng()) is None


# intervals


@pytest.mark.parametrize(("members", "others", "digits"), [(40, 90, 9), (90, 40, 0), (15, 15, 9), (15, 15, 0)])
def test_intervals_are_those_of_scipys_bootstrap(members: int, others: int, digits: int) -> None:
    generator = rng(members)
    groups = normal(generator, members, mean=0.7, digits=digits), normal(generator, others, digits=digits)

    def area(a: Floats, b: Floats, axis: int) -> Floats:
        a, b = a[..., :, None], b[..., None, :]
        return ((a > b) + (a == b) / 2).mean((-2, -1))

    def rate(a: Floats, b: Floats, axis: int) -> Floats:
        bar = np.sort(b)[..., -(others // 10) - 1, None]
        return (a > bar).mean(-1)

    found = auc(*groups, generator=generator), true_positive_rate(*groups, one_in=10, generator=generator)
    for estimate, statistic in zip(found, (area, rate), strict=True):
        expected = stats.bootstrap(groups, statistic, method="percentile", n_resamples=2000, batch=200, rng=rng(1))
        low, high = expected.confidence_interval
        # the 2.5 % quantile of 1,000 resamples has a standard error of about a fiftieth of the interval's width
        room = 0.1 * (high - low) + (statistic is rate) / members
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=room)


@pytest.mark.parametrize("n", [12, 50])
def test_intervals_of_identical_distributions_hold_one_half_at_the_nominal_rate(n: int) -> None:
    held = 0
    for seed in range(200):
        generator = rng(seed)
        found = auc(normal(generator, n), normal(generator, n), generator=generator)
        held += found.low <= 0.5 <= found.high
    assert stats.binomtest(held, 200, 0.95).pvalue > 1e-3


def test_intervals_depend_on_the_seed_alone() -> None:
    members, others = normal(rng(1), 30), normal(rng(2), 40)
    found = [auc(members, others, generator=rng(5)), auc(members[::-1], sorted(others), generator=rng(5))]
    assert found[0] == found[1]
    assert found[0] != auc(members, others, generator=rng(6))


def test_many_texts_are_resampled_in_blocks() -> None:
    members, others = normal(rng(1), 3000, mean=0.1), normal(rng(2), 3000)
    found = auc(members, others, generator=rng())
    low, high = stats.norm.interval(0.95, found.value, math.sqrt((1 / 12 + 1 / 12) / 3000))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.003)


# rows and refusals


def scored(values: list[float], *, without: str = "") -> list[dict[str, float]]:
    return [{score: value + number for number, score in enumerate(SCORES) if score != without} for value in values]


def test_the_base_model_has_no_ratio() -> None:
    members, others = scored(normal(rng(1), 9), without="ratio"), scored(normal(rng(2), 9), without="ratio")
    rows = membership_rows("base", records="canaries", copies=3, members=members, non_members=others, seed=0)
    assert [row.score for row in rows] == ["loss", "min-k", "min-k++", "zlib"]
    assert {(row.model, row.records, row.copies) for row in rows} == {("base", "canaries", 3)}
    assert len({row.auc.model_dump_json() for row in rows}) == 1  # shifted alike, resampled alike


@pytest.mark.parametrize(
    ("members", "others", "missing", "words"),
    [
        (5, 1000, set(), []),
        (5, 999, {"tpr_at_01"}, ["0.1 % false positives needs 1,000"]),
        (5, 100, {"tpr_at_01"}, ["0.1 % false positives needs 1,000"]),
        (5, 99, {"tpr_at_1", "tpr_at_01"}, ["1 % false positives needs 100", "0.1 % false positives needs 1,000"]),
    ],
)
def test_what_is_refused_is_said(members: int, others: int, missing: set[str], words: list[str]) -> None:
    groups = scored(normal(rng(1), members)), scored(normal(rng(2), others))
    rows = membership_rows(
        "base", records="records of north", copies=None, members=groups[0], non_members=groups[1], seed=0
    )
    assert len(rows) == len(SCORES)
    for row in rows:
        assert {name for name in ("tpr_at_1", "tpr_at_01") if getattr(row, name) is None} == missing
    said = refusals(records="records of north", copies=None, members=members, non_members=others)
    assert len(said) == len(words)
    for sentence, part in zip(said, words, strict=True):
        assert sentence.startswith("membership of records of north:")
        assert part in sentence
        assert f"there are {others}" in sentence


@pytest.mark.parametrize(("members", "others"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_without_both_groups(members: int, others: int) -> None:
    groups = scored(normal(rng(1), members)), scored(normal(rng(2), others))
    assert membership_rows("base", records="canaries", copies=1, members=groups[0], non_members=groups[1], seed=0) == []
    (sentence,) = refusals(records="canaries", copies=1, members=members, non_members=others)
    assert sentence.startswith("membership of canaries with 1 copy:")
    assert f"there are {members} and {others}" in sentence


def test_every_score_has_the_figures_of_its_own() -> None:
    values = rng(3).normal(size=(len(SCORES), 240)) + np.linspace(0, 1, len(SCORES))[:, None] * (np.arange(240) < 120)
    texts = [dict(zip(SCORES, column, strict=True)) for column in values.T.tolist()]
    rows = membership_rows("m", records="canaries", copies=1, members=texts[:120], non_members=texts[120:], seed=7)
    for row, column in zip(rows, values.tolist(), strict=True):
        assert row.auc == auc(column[:120], column[120:], generator=rng(7))
        assert row.tpr_at_1 == true_positive_rate(column[:120], column[120:], one_in=100, generator=rng(7))
    assert len({row.auc.value for row in rows}) == len(SCORES)
