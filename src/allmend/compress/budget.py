"""One option for each tensor, so that all fit a budget and cost as little as can be: the multiple-choice knapsack.

Costs are taken to add up. What is kept while tensors are taken in one after the other are the sums that nothing smaller
is cheaper than; where they become too many, sizes are rounded up to a grid, so that no plan is ever above the budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allmend.errors import UserError

MOST = 2**16
"""Sums that are kept beside each other; beyond, sizes are rounded up to 2⁻¹⁶ of what all tensors take at most."""


@dataclass(frozen=True)
class Choice:
    """A plan.

    Attributes:
        options: for each tensor, the place of its option.
        size: bytes of all.
        cost: of all.
    """

    options: tuple[int, ...]
    size: int
    cost: float


def search_budget(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> Choice:
    """The cheapest choice of one option for each tensor within a budget.

    Args:
        costs: for each tensor, of each option; not a number for one that may not be taken.
        sizes: the same, bytes.
        budget: bytes that all may take together.

    Returns:
        The best there is while at most 2¹⁶ sums matter; beyond, at most 2⁻¹⁶ of the largest plan's size is left unused
        for each tensor.

    Raises:
        UserError: even the smallest options are above the budget; their size is named.
    """
    smallest = sum(min(own) for own in map(_allowed_sizes, costs, sizes))
    if smallest > budget:
        raise UserError(
            f"the smallest possible size is {smallest / 1e6:,.1f} MB, and {budget / 1e6:,.1f} MB are asked for",
            hint="Raise the budget, or allow smaller formats.",
        )
    grid = max(1, sum(max(own) for own in sizes) // MOST)
    weights, totals = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for own_costs, own_sizes in zip(costs, sizes, strict=True):
        cost, size = np.asarray(own_costs, dtype=np.float64), np.asarray(own_sizes, dtype=np.int64)
        all_sizes = (weights[:, None] + size).ravel()
        all_costs = (totals[:, None] + np.where(np.isnan(cost), np.inf, cost)).ravel()
        kept = _frontier(all_sizes, all_costs, budget)
        if len(kept) > MOST:
            all_sizes = -(-all_sizes // grid) * grid
            kept = _frontier(all_sizes, all_costs, budget)
        steps.append((kept // len(size), kept % len(size)))
        weights, totals = all_sizes[kept], all_costs[kept]
    place, chosen = int(np.argmin(totals)), list[int]()
    cost_of_all = float(totals[place])
    for before, option in reversed(steps):
        chosen.append(int(option[place]))
        place = int(before[place])
    chosen.reverse()
    return Choice(tuple(chosen), sum(own[at] for own, at in zip(sizes, chosen, strict=True)), cost_of_all)


def _allowed_sizes(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    return [size for cost, size in zip(costs, sizes, strict=True) if cost == cost]


def _frontier(sizes: np.ndarray, costs: np.ndarray, budget: int) -> np.ndarray:
    """Places of what fits and is cheaper than all that is not larger, by size."""
    order = np.lexsort((costs, sizes))
    order = order[(sizes[order] <= budget) & np.isfinite(costs[order])]
    before = np.minimum.accumulate(np.concatenate([[np.inf], costs[order]]))[:-1]
    kept: np.ndarray = order[costs[order] < before]
    return kept
