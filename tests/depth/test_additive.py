from itertools import combinations, pairwise

import numpy as np
import pytest

from allmend.depth.additive import best_firsts, best_pairs


@pytest.mark.parametrize("layers", range(2, 13))
def test_the_programme_equals_trying_everything(layers: int) -> None:
    costs = np.random.default_rng(layers).normal(size=layers - 1).tolist()
    for pairs in range(layers // 2 + 1):
        apart = [
            firsts for firsts in combinations(range(layers - 1), pairs) if all(b - a > 1 for a, b in pairwise(firsts))
        ]
        least = min(sum(costs[first] for first in firsts) for firsts in apart)

        found = best_firsts(costs, pairs)

        assert found in apart
        assert sum(costs[first] for first in found) == pytest.approx(least, abs=1e-12)


def test_the_plan_has_the_pairs() -> None:
    assert best_pairs([5.0, 1.0, 5.0, 2.0], 2).together == ((1, 2), (3, 4))


def test_more_pairs_than_there_are() -> None:
    with pytest.raises(ValueError, match="no 3 disjoint pairs"):
        best_firsts([1.0] * 4, 3)
