"""Agreement of methods: of one with itself, with its opposite, and of unrelated ones; against scipy's."""

import numpy as np
import pytest
from scipy import stats

from allmend.influence.agreement import rank_agreement


def test_it_is_the_mean_over_targets_of_scipy_s_correlation() -> None:
    generator = np.random.default_rng(0)
    scores = {name: generator.integers(0, 9, size=(20, 6)).astype(float) for name in "xyz"}
    found = rank_agreement(scores)
    assert list(found) == [("x", "y"), ("x", "z"), ("y", "z")]
    for (first, second), one in found.items():
        each = [stats.spearmanr(scores[first][:, q], scores[second][:, q]).statistic for q in range(6)]
        assert one.value == pytest.approx(np.mean(each))
        assert one.n == 6
        assert one.low is not None
        assert one.high is not None
        assert min(each) <= one.low <= one.value <= one.high <= max(each)


def test_order_is_all_that_counts() -> None:
    drawn = np.random.default_rng(0).normal(size=(12, 3))
    found = rank_agreement(
        {"one": drawn, "same": np.exp(drawn) * 7, "opposite": -(drawn**3), "flat": np.zeros((12, 3))}
    )
    assert found["one", "same"].value == pytest.approx(1)
    assert found["one", "opposite"].value == pytest.approx(-1)
    assert found["one", "flat"].value == 0
