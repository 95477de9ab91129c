"""Whether methods of influence agree: the rank correlation of their scores, pair by pair."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from allmend.influence.quality import bootstrap_mean, spearman
from allmend.results import Estimate


def rank_agreement(scores: Mapping[str, "np.ndarray"], *, seed: int = 0) -> dict[tuple[str, str], Estimate]:
    """Spearman's correlation over records of each pair's scores for a target; its mean over targets.

    Args:
        scores: by method, [n, q] of n records for q targets.
        seed: of the bootstrap over targets.

    Returns:
        By pair, in the order in which the methods are given.
    """
    return {
        (first, second): bootstrap_mean(spearman(scores[first], scores[second]), seed=seed)
        for first, second in combinations(scores, 2)
    }
