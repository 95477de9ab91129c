"""Sums of scores against the tables of the scores themselves."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend.consortium.scoring import Moments, Paired
from allmend.learn.compare import ModelScores, utility_table
from allmend.learn.evaluate import Score
from allmend.results import POOLED


@st.composite
def members(draw: Any) -> list[list[tuple[Score, Score]]]:
    """Each member's records under two models."""

    def record(index: int) -> tuple[Score, Score]:
        tokens = draw(st.integers(0, 9))
        question = draw(st.booleans())
        made = []
        for _ in range(2):
            nll = draw(st.floats(0, 50)) if tokens else 0.0
            answer = {"choice": draw(st.integers(0, 3)), "answer": 0, "choices": 4} if question else {}
            made.append(Score(str(index), "", nll, tokens, **answer))
        return made[0], made[1]

    return [[record(i) for i in range(draw(st.integers(0, 6)))] for _ in range(draw(st.integers(1, 3)))]


@given(members())
def test_sums_make_the_rows_that_scores_make(found: list[list[tuple[Score, Score]]]) -> None:
    first, second = ({str(i): [pair[side] for pair in own] for i, own in enumerate(found)} for side in (0, 1))
    table = utility_table([ModelScores("base", None, second), ModelScores("arm", None, first)], main="arm", seed=0)
    facts: dict[str, float] = {}
    for name in first:
        own = Moments.of(first[name]).facts("arm") | Paired.of(first[name], second[name]).facts("arm-base")
        facts = {key: facts.get(key, 0.0) + value for key, value in own.items()}
    row = next(row for row in table.rows if (row.model, row.held_out) == ("arm", POOLED))
    made = Moments.from_facts(facts, "arm").utility("arm")
    assert made.accuracy == row.accuracy
    assert made.chance == pytest.approx(row.chance) if row.chance is not None else made.chance is None
    assert (made.perplexity is None) == (row.perplexity is None)
    if row.perplexity and made.perplexity:
        assert made.perplexity.n == row.perplexity.n
        for side in ("value", "low", "high"):
            expected, value = getattr(row.perplexity, side), getattr(made.perplexity, side)
            assert value == pytest.approx(expected, rel=1e-5) if expected is not None else value is None
    difference = next((d for d in table.differences if d.held_out == POOLED), None)
    made_difference = Paired.from_facts(facts, "arm-base").difference("arm", "base")
    assert (made_difference is None) == (difference is None)
    if difference and made_difference:
        for what in ("accuracy", "log_perplexity"):
            expected, made_one = getattr(difference, what), getattr(made_difference, what)
            assert (expected is None) == (made_one is None)
            if expected is not None:
                assert made_one.n == expected.n
                for side in ("value", "low", "high"):
                    end, value = getattr(expected, side), getattr(made_one, side)
                    assert value == pytest.approx(end, abs=1e-5) if end is not None else value is None


def test_nobody_is_no_row() -> None:
    empty = Moments.from_facts({}, "arm").utility("arm")
    assert (empty.perplexity, empty.accuracy, empty.chance) == (None, None, None)
    assert Paired.from_facts({}, "x").difference("a", "b") is None


@pytest.mark.parametrize("key", ["nll", "squared_nll", "product", "tokens", "records", "total", "asked"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_sums_that_would_spoil_those_of_others_are_not_possible(key: str, value: float) -> None:
    facts = Paired.of([Score("0", "", 2.0, 3)], [Score("0", "", 3.0, 3)]).facts("x")
    assert Paired.from_facts(facts, "x").possible
    assert not Paired.from_facts(facts | {f"x/{key}": value}, "x").possible
