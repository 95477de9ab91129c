"""How sure scores are: whether two halves of the target records agree on which training records help."""

import random
from collections.abc import Sequence

import torch
from scipy import stats

from allmend.intervals import mean
from allmend.results import Estimate

SPLITS = 5


def halves(groups: Sequence[str], *, seed: int) -> list[set[str]]:
    """Each target record's groups: its own, and a half of it in each split, named `GROUP/split/half`.

    Args:
        groups: of the records.
        seed: of the splits.
    """
    found = [{group} for group in groups]
    for group in sorted(set(groups)):
        places = [place for place, other in enumerate(groups) if other == group]
        if len(places) < 2:
            continue
        for split in range(SPLITS):
            random.Random(f"{seed}/{group}/{split}").shuffle(places)
            for order, place in enumerate(places):
                found[place].add(f"{group}/{split}/{order % 2}")
    return found


def agreement(names: Sequence[str], values: torch.Tensor, group: str) -> Estimate | None:
    """Spearman's correlation of the scores that both halves of a group give, over splits; None for a single record.

    Args:
        names: of the targets, as `halves` made them.
        values: scores [n, q].
        group: which.
    """
    place = {name: index for index, name in enumerate(names)}
    found = []
    for split in range(SPLITS):
        pair = [place.get(f"{group}/{split}/{half}") for half in (0, 1)]
        if None in pair or len(values) < 3:
            continue
        a, b = (values[:, index] for index in pair if index is not None)
        if (correlation := rank_correlation(a, b)) is not None:
            found.append(correlation)
    return mean(found, bounds=(-1.0, 1.0)) if found else None


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Spearman's correlation of two sets of scores [n]; None of fewer than two, or where all of one are equal."""
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return None
    return float(stats.spearmanr(first.numpy(), second.numpy()).statistic)
