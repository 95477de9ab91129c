"""Models side by side: what is paired with what, and which words the figures allow."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest
from scipy import stats

from allmend.audit.compare import Audited, compare
from allmend.intervals import mean, share
from allmend.learn.compare import ModelScores, utility_table
from allmend.learn.evaluate import Score
from allmend.probes import Probe
from allmend.results import (
    AuditTable,
    ComparedPair,
    EpsilonBound,
    Exposure,
    Extraction,
    LikelihoodGap,
    Membership,
)

COUNT = 12
"""Canaries of each number of copies; every second one is a control."""


def audited(
    label: str,
    *,
    kept: float = 1.0,
    nll: float = 2.0,
    copies: Sequence[int] = (1, 10),
    prefixes: Sequence[int] = (10, 30),
    texts: str = "text",
    seed: int = 0,
) -> Audited:
    """A model that gives inserted canaries `kept` nats per token more, and held-out records `nll` less than 0.

    What makes a canary or a record easy is the same for every model; what the model makes of it is its own.
    """
    easy, own = random.Random(0), random.Random(f"{seed}/{label}")
    probes = []
    for number in copies:
        for index in range(COUNT):
            inserted = index % 2 == 0
            value = -5 + easy.gauss(0, 1) + own.gauss(0, 0.05) + kept * inserted
            probes += [
                Probe(
                    "arm", f"{number}x/{index}", "note", "a", number, inserted, f"{prefix} tokens", prefix,
                    inserted and kept > 2, 0.5, 0.5, 0, 0, -9.0, value,
                )
                for prefix in prefixes
            ]  # fmt: skip
    scores = [
        Score(f"r{index}", "q", 20 * nll + easy.gauss(0, 3) + own.gauss(0, 0.2), 20, choice=0, answer=0, choices=2)
        for index in range(30)
    ]
    models = ModelScores("arm", None, {"north": scores})
    cells = [(number, inserted) for number in copies for inserted in (True, False)]
    values = {
        cell: [p.log_likelihood for p in probes if (p.copies, p.inserted) == cell and p.prefix_tokens == prefixes[0]]
        for cell in cells
    }
    audit = AuditTable(
        extraction=tuple(
            Extraction(
                model="arm", copies=number, inserted=inserted, prefix=f"{prefix} tokens", prefix_tokens=prefix,
                exact=share(COUNT // 2 * (inserted and kept > 2), COUNT // 2), matched=mean([0.5]), bleu=mean([0.5]),
                approximate=share(0, COUNT // 2),
            )
            for number, inserted in cells
            for prefix in prefixes
        ),
        gaps=tuple(
            LikelihoodGap(
                model="arm", copies=number, inserted=mean(values[number, True]), control=mean(values[number, False]),
                gap=mean([fmean(values[number, True]) - fmean(values[number, False])]),
            )
            for number in copies
        ),
        exposure=tuple(
            Exposure(
                model="arm", copies=number, inserted=inserted, slot=slot, values=8, compared=8,
                exposure=mean([2.0 + number + inserted, 2.0 + number + inserted + (slot == "ward")]),
            )
            for number, inserted in cells
            for slot in ("ward", "day")
        ),
        membership=tuple(
            Membership(model="arm", records="canaries", copies=number, score=score, auc=mean([0.5 + 0.01 * number]))
            for number in copies
            for score in ("loss", "ratio")
        ),
        epsilon=tuple(
            EpsilonBound(
                model="arm", copies=number, epsilon=float(number or 99), delta=0.0, confidence=0.95, guesses=4,
                right=4, canaries=COUNT,
            )
            for number in (*copies, None)
        ),
        canaries=COUNT // 2 * len(copies),
        controls=COUNT // 2 * len(copies),
        seed=0,
    )  # fmt: skip
    utility = utility_table([models], main="arm", seed=0)
    known = {probe.canary: f"{texts} {probe.canary}" for probe in probes}
    return Audited(label, "arm", audit, utility, probes, known, models)


def pair(first: Audited, second: Audited) -> ComparedPair:
    (found,) = compare([first, second]).pairs
    return found


# --- rows


def test_a_row_is_about_the_most_copies_and_the_longest_prefix_that_all_have() -> None:
    wide = audited("wide", copies=(1, 3, 10), prefixes=(10, 30, 50), kept=3.0)
    narrow = audited("narrow", copies=(1, 3), prefixes=(10, 30))
    for row in compare([wide, narrow]).models:
        assert (row.copies, row.prefix) == (3, "30 tokens")
    first, second = compare([wide, narrow]).models
    assert (first.label, second.label) == ("wide", "narrow")
    assert first.exact == share(COUNT // 2, COUNT // 2)
    assert first.exact_controls == second.exact == share(0, COUNT // 2)
    assert first.gap == next(gap.gap for gap in wide.audit.gaps if gap.copies == 3)
    assert first.exposure is not None
    assert first.exposure.value == pytest.approx((6.5 + 6.0) / 2)  # of two slots, inserted canaries alone
    assert first.exposure.low is None
    assert first.auc is not None
    assert first.auc.value == 0.53
    (alone,) = compare([wide]).models
    assert (alone.copies, alone.prefix) == (10, "50 tokens")


def test_measured_and_accounted_epsilon_are_about_one_record() -> None:
    """What ten copies cost together is no bound on what the accountant speaks of."""
    (row,) = compare([replace(audited("private"), accounted=3.0)]).models
    assert (row.measured, row.accounted) == (1.0, 3.0)
    assert row.measured_together == 10.0
    (row,) = compare([audited("plain", copies=(10,))]).models
    assert (row.measured, row.measured_together, row.accounted) == (None, 10.0, None)
    (row,) = compare([audited("once", copies=(1,))]).models
    assert (row.measured, row.measured_together) == (1.0, None)


def test_utility_is_that_of_the_pooled_records() -> None:
    one = audited("one")
    (row,) = compare([one]).models
    assert one.utility is not None
    assert row.perplexity in [line.perplexity for line in one.utility.rows if line.held_out == "pooled"]
    assert row.accuracy is not None
    assert row.accuracy.value == 1.0


# --- pairs


def test_differences_are_paired_by_canary_and_by_record() -> None:
    """What makes a canary or a record easy cancels: the interval is that of the models' own parts, not of the texts."""
    found = pair(audited("base", kept=1.0), audited("other", kept=0.5))
    assert (found.label, found.other, found.paired) == ("other", "base", True)
    for difference, expected in ((found.gap, -0.5), (found.log_perplexity, 0.0)):
        assert difference is not None
        assert difference.low is not None
        assert difference.high is not None
        assert difference.low <= expected <= difference.high
        assert difference.high - difference.low < 0.3  # unpaired, the texts' own spread would make it above 1
    assert found.gap is not None
    assert found.gap.n == COUNT


def test_the_exact_difference_is_of_inserted_canaries() -> None:
    found = pair(audited("base", kept=3.0), audited("other", kept=1.0))
    assert found.exact is not None
    assert (found.exact.value, found.exact.n) == (-1.0, COUNT // 2)
    turned = pair(audited("other", kept=1.0), audited("base", kept=3.0)).exact
    assert turned is not None
    assert turned.value == 1.0


@pytest.mark.parametrize("inserted", [True, False])
@pytest.mark.parametrize("change", ["coins", "missing"])
def test_the_pairing_rests_on_the_canaries_that_both_were_asked_for(change: str, inserted: bool) -> None:
    """Poisson sampling may never draw an inserted canary, which is then left out of that arm's probes alone."""
    base, other = audited("base", kept=3.0), audited("other", kept=0.1)
    gone = "10x/4" if inserted else "10x/3"
    assert [probe.inserted for probe in other.probes if probe.canary == gone] == [inserted] * 2
    if change == "coins":
        probes = [replace(probe, inserted=not inserted) if probe.canary == gone else probe for probe in other.probes]
    else:
        probes = [probe for probe in other.probes if probe.canary != gone]
    # the same as if neither had been asked for it
    expected = pair(*(replace(one, probes=[p for p in one.probes if p.canary != gone]) for one in (base, other)))
    for turned in (False, True):
        first, second = base, replace(other, probes=probes)
        found = pair(second, first) if turned else pair(first, second)
        sign = -1 if turned else 1
        assert found.paired
        for name, n in (("gap", COUNT - 1), ("exact", COUNT // 2 - inserted)):
            difference, same = getattr(found, name), getattr(expected, name)
            assert difference.n == same.n == n
            assert difference.value == pytest.approx(sign * same.value)
        assert found.gap is not None
        assert expected.gap is not None
        assert found.gap.low is not None
        assert found.gap.low == pytest.approx(expected.gap.low if not turned else -(expected.gap.high or 0))
    assert "other reduces memorisation against base" in expected.words


@pytest.mark.parametrize("change", ["texts", "inserted", "controls", "none"])
def test_other_canaries_are_not_paired(change: str) -> None:
    base, other = audited("base"), audited("other", kept=0.1)
    match change:
        case "texts":  # another seed: the same ids, other secrets
            other = audited("other", kept=0.1, texts="other text")
        case "inserted" | "controls":
            left = [probe for probe in other.probes if probe.inserted is (change == "controls")]
            other = replace(other, probes=left)
        case "none":
            other = replace(other, probes=())
    found = pair(base, other)
    assert (found.paired, found.exact, found.gap) == (False, None, None)
    assert "not asked for the same canaries" in found.words
    assert "reduces" not in found.words
    assert found.log_perplexity is not None  # held-out records are the same ones


def test_the_difference_in_log_perplexity_is_that_of_the_perplexities_beside_it() -> None:
    """A token counts alike wherever it stands: short records may fall the other way."""
    base, other = audited("base"), audited("other")
    lengths = [2] * 20 + [200] * 10
    for one, short, long in ((base, 2.0, 2.0), (other, 3.0, 1.9)):
        assert one.scores is not None
        own = random.Random(one.label)
        scores = [
            replace(score, tokens=tokens, nll=tokens * ((short if tokens == 2 else long) + own.gauss(0, 0.001)))
            for score, tokens in zip(one.scores.by_client["north"], lengths, strict=True)
        ]
        models = ModelScores("arm", None, {"north": scores})
        if one is base:
            base = replace(base, scores=models, utility=utility_table([models], main="arm", seed=0))
        else:
            other = replace(other, scores=models, utility=utility_table([models], main="arm", seed=0))
    found = compare([base, other])
    perplexities = [model.perplexity.value for model in found.models if model.perplexity]
    difference = found.pairs[0].log_perplexity
    assert difference is not None
    assert difference.value == pytest.approx(math.log(perplexities[1] / perplexities[0]))
    assert difference.n == sum(lengths)
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < difference.value < difference.high < 0


def test_other_records_are_not_paired_and_none_are_needed() -> None:
    base, other = audited("base"), audited("other")
    assert other.scores is not None
    renamed = {"north": [replace(score, id=f"x{score.id}") for score in other.scores.by_client["north"]]}
    found = pair(base, replace(other, scores=ModelScores("arm", None, renamed)))
    assert (found.log_perplexity, found.accuracy) == (None, None)
    assert found.gap is not None
    found = pair(base, replace(other, scores=None, utility=None))
    assert (found.log_perplexity, found.same_utility) == (None, None)
    assert "utility was not measured" in pair(base, replace(audited("o", kept=0.1), scores=None, utility=None)).words


# --- words


@pytest.mark.parametrize(
    ("kept", "nll", "words"),
    [
        (0.2, 2.0, "other reduces memorisation against base, at utility that overlaps"),
        (2.0, 2.0, "other increases memorisation against base, at utility that overlaps"),
        (1.0, 2.0, "No difference in memorisation shown between other and base"),
        (0.2, 3.0, "other keeps less of the canaries than base, but their utility differs too"),
        (2.0, 3.0, "other keeps more of the canaries than base, but their utility differs too"),
        (0.2, 1.0, "other keeps less of the canaries than base, but their utility differs too"),
    ],
)
def test_the_verdict_says_reduces_only_where_utility_overlaps(kept: float, nll: float, words: str) -> None:
    found = pair(audited("base"), audited("other", kept=kept, nll=nll))
    assert found.words.startswith(words)
    assert found.same_utility == (nll == 2.0)


def test_both_measures_of_utility_must_overlap() -> None:
    """The same perplexity, but one answers all questions and the other none."""
    base, other = audited("base"), audited("other", kept=0.1)
    assert other.scores is not None
    wrong = ModelScores("arm", None, {"north": [replace(s, choice=1) for s in other.scores.by_client["north"]]})
    found = pair(base, replace(other, scores=wrong, utility=utility_table([wrong], main="arm", seed=0)))
    assert found.same_utility is False
    assert found.accuracy is not None
    assert found.accuracy.value == -1.0
    assert "reduces" not in found.words


def test_the_interval_of_the_gap_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(300):
        found = pair(audited("base", kept=1.0, seed=seed), audited("other", kept=0.5, seed=seed))
        assert found.gap is not None
        assert found.gap.low is not None
        assert found.gap.high is not None
        hits += found.gap.low <= -0.5 <= found.gap.high
    assert stats.binomtest(hits, 300, 0.95).pvalue > 1e-3


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="no models"):
        compare([])
