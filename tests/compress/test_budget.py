"""Plans within a budget against every plan there is."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from allmend.compress import budget as module
from allmend.compress.budget import search_budget
from allmend.errors import UserError


def problem(tensors: int, options: int, seed: int, largest: int = 40) -> tuple[list[list[float]], list[list[int]]]:
    generator = np.random.default_rng(seed)
    costs = [[float(cost) for cost in generator.exponential(size=options)] for _ in range(tensors)]
    sizes = [[int(size) for size in generator.integers(1, largest, size=options)] for _ in range(tensors)]
    return costs, sizes


def best(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    plans = itertools.product(*(range(len(own)) for own in costs))
    fitting = [
        sum(own[at] for own, at in zip(costs, plan, strict=True))
        for plan in plans
        if sum(own[at] for own, at in zip(sizes, plan, strict=True)) <= budget
    ]
    return min((cost for cost in fitting if not math.isnan(cost)), default=math.inf)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_it_is_the_best_of_all(seed: int, share: float) -> None:
    costs, sizes = problem(6, 4, seed)
    low, high = (sum(pick(own) for own in sizes) for pick in (min, max))
    budget = int(low + share * (high - low))
    found = search_budget(costs, sizes, budget)
    assert found.size <= budget
    assert found.size == sum(own[at] for own, at in zip(sizes, found.options, strict=True))
    assert found.cost == pytest.approx(sum(own[at] for own, at in zip(costs, found.options, strict=True)))
    assert found.cost == pytest.approx(best(costs, sizes, budget))


def test_an_option_that_may_not_be_taken_is_not() -> None:
    costs, sizes = problem(5, 3, 1)
    costs[2][0] = costs[4][1] = math.nan
    found = search_budget(costs, sizes, 150)
    assert found.options[2] != 0
    assert found.options[4] != 1
    assert found.cost == pytest.approx(best(costs, sizes, 150))


@pytest.mark.parametrize("most", [8, 64, 2**16])
def test_more_room_is_never_worse_and_nothing_is_over_it(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", most)
    costs, sizes = problem(40, 6, 3, largest=1000)
    low, high = (sum(pick(own) for own in sizes) for pick in (min, max))
    room = 40 * max(1, sum(max(own) for own in sizes) // most)
    before = math.inf
    for budget in range(low + room, high, 701):
        found = search_budget(costs, sizes, budget)
        assert found.size <= budget
        assert found.cost <= before + 1e-12
        before = found.cost


def test_many_tensors_cost_what_an_integer_programme_finds() -> None:
    costs, sizes = problem(40, 6, 5, largest=100_000)
    budget = sum(map(max, sizes)) // 2
    cost, size = (np.array(some, dtype=float) for some in (costs, sizes))
    one_each = np.kron(np.eye(40), np.ones(6))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(size.ravel()[None], ub=budget)]
    expected = milp(cost.ravel(), constraints=limits, integrality=np.ones(240), bounds=Bounds(0, 1))

    found = search_budget(costs, sizes, budget)

    assert expected.fun * (1 - 1e-9) <= found.cost <= expected.fun * 1.002


def test_below_the_smallest_size_it_is_named() -> None:
    costs, sizes = problem(4, 3, 0)
    smallest = sum(map(min, sizes))
    assert search_budget(costs, sizes, smallest).size == smallest
    with pytest.raises(UserError, match=r"smallest possible size is 0\.0 MB"):
        search_budget(costs, sizes, smallest - 1)
    with pytest.raises(UserError, match=r"smallest possible size is 12\.0 MB, and 9\.0 MB"):
        search_budget([[1.0, 2.0]], [[30_000_000, 12_000_000]], 9_000_000)


def test_no_tensors_need_no_room() -> None:
    assert search_budget([], [], 0) == module.Choice((), 0, 0.0)
