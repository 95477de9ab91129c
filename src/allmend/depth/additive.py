"""The best disjoint pairs if costs of pairs add up, which those of pairs apart nearly do."""

from collections.abc import Sequence

from allmend.depth.plan import Plan, pairs_plan


def best_firsts(costs: Sequence[float], pairs: int) -> tuple[int, ...]:
    """First layers of the disjoint pairs of neighbours whose costs have the smallest sum.

    A dynamic programme over layers and pairs: best(i, k) = min(best(i + 1, k), costs[i] + best(i + 2, k − 1)).

    Args:
        costs: of the pair (i, i + 1) for each i.
        pairs: how many.

    Raises:
        ValueError: there are not so many disjoint pairs.
    """
    layers = len(costs) + 1
    if not 0 <= pairs <= layers // 2:
        raise ValueError(f"{layers} layers have no {pairs} disjoint pairs")
    # of the layers from i on: sum and first layers of the best k pairs; two layers beyond the last hold no pair
    best: list[list[tuple[float, tuple[int, ...]] | None]] = [[(0.0, ()), *[None] * pairs] for _ in range(layers + 2)]
    for first in reversed(range(layers - 1)):
        for count in range(1, pairs + 1):
            without, rest = best[first + 1][count], best[first + 2][count - 1]
            taken = None if rest is None else (costs[first] + rest[0], (first, *rest[1]))
            options = [option for option in (without, taken) if option is not None]
            best[first][count] = min(options, default=None)
    found = best[0][pairs]
    assert found is not None
    return found[1]


def best_pairs(costs: Sequence[float], pairs: int) -> Plan:
    """The plan of `best_firsts`."""
    return pairs_plan(len(costs) + 1, best_firsts(costs, pairs))
