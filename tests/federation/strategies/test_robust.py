"""Robust averages: what a few wrong members can do, and other ways to the same numbers."""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean

from allmend.errors import UserError
from allmend.federation.strategies.robust import Krum, Median, TrimmedMean
from allmend.models.tensors import Tensors
from allmend.strategy import Seen, Sums, Turn

numbers = st.floats(-100, 100, width=32)


def changes(rows: list[list[float]]) -> list[Tensors]:
    return [{"a": torch.tensor(row[:1]), "b": torch.tensor(row[1:]).view(1, -1)} for row in rows]


def flat(tensors: Tensors) -> list[float]:
    return torch.cat([tensors["a"], tensors["b"].flatten()]).tolist()


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=9))
def test_the_median_is_that_of_each_number(rows: list[list[float]]) -> None:
    assert flat(Median().centre(changes(rows))) == [statistics.median(column) for column in zip(*rows, strict=True)]


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=9), st.sampled_from([0.0, 0.1, 0.34]))
def test_the_trimmed_mean_is_scipys(rows: list[list[float]], trim: float) -> None:
    found = flat(TrimmedMean(trim=trim).centre(changes(rows)))
    np.testing.assert_allclose(found, trim_mean(np.array(rows, dtype=np.float64), trim), rtol=1e-9, atol=1e-9)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=5, max_size=7, unique_by=tuple), st.integers(1, 3))
def test_krum_is_its_definition(rows: list[list[float]], kept: int) -> None:
    n, f = len(rows), 1
    scores = []
    for one in range(n):
        squares = sorted(
            sum((a - b) ** 2 for a, b in zip(rows[one], rows[i], strict=True)) for i in range(n) if i != one
        )
        scores.append(sum(squares[: n - f - 2]))
    found = flat(Krum(malicious=f, kept=kept).centre(changes(rows)))
    best = sorted(range(n), key=scores.__getitem__)[:kept]
    if len(set(scores)) == n:
        np.testing.assert_allclose(found, np.mean([rows[place] for place in best], axis=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", [Median(), TrimmedMean(trim=0.2), Krum(malicious=1), Krum(malicious=1, kept=3)])
@pytest.mark.parametrize("wrong", [1e30, -1e30, 3.0])
def test_one_wrong_member_of_five_does_not_carry_the_others_away(strategy: Any, wrong: float) -> None:
    """Wherever it is, the outcome lies within what the four others say; their plain mean does not."""
    honest = [[0.9, 1.1, -0.1], [1.0, 1.0, 0.0], [1.1, 0.9, 0.1], [1.0, 1.05, 0.0]]
    found = flat(strategy.centre(changes([*honest, [wrong] * 3])))
    low, high = np.min(honest, axis=0), np.max(honest, axis=0)
    assert (np.array(found) >= low - 1e-6).all()
    assert (np.array(found) <= high + 1e-6).all()
    assert not (np.mean([*honest, [wrong] * 3], axis=0) <= high).all() or wrong < 0


@pytest.mark.parametrize("strategy", [Median(), TrimmedMean(), Krum(), Krum(kept=2)])
def test_the_order_of_members_does_not_matter_and_agreement_is_kept(strategy: Any) -> None:
    rows = [[float(i), float(i * i), 1.0] for i in range(5)]
    outcomes = {tuple(flat(strategy.centre(changes(list(order))))) for order in itertools.permutations(rows)}
    assert len(outcomes) == 1
    assert flat(strategy.centre(changes([[1.0, 2.0, 3.0]] * 5))) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("strategy", [Median(), TrimmedMean(), Krum(malicious=0)])
def test_a_round_moves_the_shared_parameters_by_the_centre(strategy: Any, make_toy: Callable[..., Any]) -> None:
    clients = [make_toy(name, count) for name, count in (("a", 1), ("b", 50), ("c", 2))]
    state, turn = strategy.init({"x": torch.ones(3)}), Turn(1, 0, 1)
    sums, seen = Sums(), {}
    for name, task in strategy.plan(state, turn, ["a", "b", "c"]).items():
        reply = strategy.work(task, next(client for client in clients if client.name == name))
        assert not reply.summed
        revealed = strategy.revealed(task, reply)
        torch.testing.assert_close(revealed["x"], 1 + next(c for c in clients if c.name == name).step)
        sums.add(reply)
        seen[name] = Seen(reply.seen, reply.seen_facts)
    shared = strategy.shared(strategy.combine(state, turn, sums, seen))
    centre = strategy.centre([{"x": client.step} for client in clients])["x"]
    torch.testing.assert_close(shared["x"], (1 + centre).float())


def test_that_changes_are_seen_is_declared() -> None:
    for strategy in (Median(), TrimmedMean(), Krum()):
        declared = strategy.declare()
        assert set(declared.seen) == {"update"}
        assert "update" not in declared.summed


def test_krum_needs_members_enough() -> None:
    for options, members, needed in (({}, 4, 5), ({"malicious": 2}, 6, 7), ({"kept": 9}, 8, 10)):
        with pytest.raises(UserError, match=f"needs {needed} members in a round, and {members} take part"):
            Krum(**options).plan(Krum().init({}), Turn(1, 0, 1), [str(i) for i in range(members)])
        Krum(**options).plan(Krum().init({}), Turn(1, 0, 1), [str(i) for i in range(needed)])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(TrimmedMean, {"trim": 0.5}), (TrimmedMean, {"trim": -0.1}), (Krum, {"malicious": -1}), (Krum, {"kept": 0})],
)
def test_impossible_options_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)
