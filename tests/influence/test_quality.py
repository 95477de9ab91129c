"""AUC and recall against counting, LDS on scores that foretell exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmend.influence.quality import detection, difference, linear_datamodeling_score


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
