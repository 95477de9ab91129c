"""AUC and recall against counting, LDS on scores that foretell exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from allmend.influence.quality import chance_lds, detection, difference, linear_datamodeling_score


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=4, max_size=30))
def test_the_auc_is_the_share_of_pairs_that_stand_right(pairs: list[tuple[int, bool]]) -> None:
    values, wrong = [float(value) for value, _ in pairs], [one for _, one in pairs]
    if len(set(wrong)) < 2:
        with pytest.raises(ValueError, match="nothing to tell apart"):
            detection(values, wrong)
        return
    high = [value for value, one in zip(values, wrong, strict=True) if one]
    low = [value for value, one in zip(values, wrong, strict=True) if not one]
    won = sum((a > b) + 0.5 * (a == b) for a in high for b in low) / len(high) / len(low)
    found = detection(values, wrong)
    assert found.auc.value == pytest.approx(won)
    assert found.auc.low is not None
    assert found.auc.low <= won + 1e-9
    order = sorted(range(len(values)), key=lambda place: -values[place])
    for depth, one in found.recall.items():
        head = order[: round(depth * len(values))]
        assert one.value == pytest.approx(sum(wrong[place] for place in head) / sum(wrong))


def test_a_measure_does_not_differ_from_itself_and_a_better_one_does() -> None:
    generator = np.random.default_rng(0)
    wrong = [bool(place % 5 == 0) for place in range(200)]
    good = [one + 0.3 * float(generator.normal()) for one in wrong]
    bad = [float(generator.normal()) for _ in wrong]
    same = difference(good, good, wrong)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    gap = difference(good, bad, wrong)
    assert gap.low is not None
    assert gap.low > 0.2


def test_scores_that_add_up_to_the_loss_foretell_it() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(40, 3))
    subsets = [generator.choice(40, 20, replace=False).tolist() for _ in range(10)]
    losses = np.stack([-scores[some].sum(0) for some in subsets])
    assert linear_datamodeling_score(scores, subsets, losses).value == pytest.approx(1)
    assert linear_datamodeling_score(-scores, subsets, losses).value == pytest.approx(-1)
    noise = linear_datamodeling_score(generator.normal(size=(40, 3)), subsets, losses)
    assert abs(noise.value) < 0.6
    with pytest.raises(ValueError, match="over 2 models says nothing"):
        linear_datamodeling_score(scores, subsets[:2], losses[:2])


def subsets_and_losses(m: int, n: int, q: int) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Halves of n records, what each record truly does for each target, and the losses that come of it."""
    generator = np.random.default_rng(1)
    effects = generator.normal(size=(n, q))
    subsets = [generator.choice(n, n // 2, replace=False).tolist() for _ in range(m)]
    return subsets, effects, 5 - np.stack([effects[some].sum(0) for some in subsets])


def test_the_lds_is_scipy_s_correlation_within_its_interval() -> None:
    subsets, effects, losses = subsets_and_losses(12, 20, 8)
    scores = effects + np.random.default_rng(2).normal(size=effects.shape)
    each = [stats.spearmanr([scores[some, q].sum() for some in subsets], -losses[:, q]).statistic for q in range(8)]
    found = linear_datamodeling_score(scores, subsets, losses)
    assert found.value == pytest.approx(np.mean(each))
    assert found.n == 8
    assert found.low is not None
    assert found.high is not None
    assert min(each) <= found.low < found.value < found.high <= max(each)
    assert (
        linear_datamodeling_score(np.ones((20, 8)), subsets, losses).value == 0
    )  # equal halves are told apart by none


def test_random_scores_have_an_lds_about_zero_that_fewer_models_scatter_more() -> None:
    widths = []
    for m in (6, 40):
        subsets, _, losses = subsets_and_losses(m, 30, 5)
        found = chance_lds(30, subsets, losses)
        assert abs(found.value) < 0.05
        assert found.low is not None
        assert found.high is not None
        assert -1 <= found.low < 0 < found.high <= 1
        widths.append(found.high - found.low)
    assert widths[0] > 1.5 * widths[1]
    with pytest.raises(ValueError, match="over 2 models says nothing"):
        chance_lds(30, subsets[:2], losses[:2])


def test_the_bounds_of_chance_hold_most_random_scores() -> None:
    subsets, _, losses = subsets_and_losses(10, 30, 4)
    bounds = chance_lds(30, subsets, losses)
    generator = np.random.default_rng(3)
    drawn = [np.repeat(generator.normal(size=(30, 1)), 4, axis=1) for _ in range(300)]
    values = [linear_datamodeling_score(one, subsets, losses).value for one in drawn]
    assert bounds.low is not None
    assert bounds.high is not None
    assert 0.9 < np.mean([bounds.low <= value <= bounds.high for value in values]) < 0.99
