"""A graph as a recipe writes it."""

import itertools

import pytest
import torch

from allmend.federation.collaboration.given import GivenGraph
from allmend.federation.collaboration.graph import Graph, pair_of


def named(given: GivenGraph, names: list[str], first: int = 0) -> dict[tuple[str, str], float]:
    numbers, weights = given.among(names, first, 0.5)
    assert len(numbers.unique()) == len(numbers)
    pairs = [(names[i], names[j]) for i, j in pair_of(numbers).T.tolist()]
    return {tuple(sorted(pair)): round(w, 6) for pair, w in zip(pairs, weights.tolist(), strict=True)}  # type: ignore[misc]


def test_members_have_the_pairs_that_are_named_and_no_others() -> None:
    given = GivenGraph.parsed("b a 0.25,\n c a 1, d,")

    assert given.members == ("b", "a", "c", "d")
    assert named(given, ["d", "c", "b", "a"]) == {("a", "b"): 0.25, ("a", "c"): 1.0}
    assert named(given, ["d", "c", "b"]) == {}


def test_who_is_not_named_begins_with_everybody() -> None:
    given = GivenGraph.parsed("a b 0.25, c")
    assert named(given, ["a", "x", "b", "c", "y"]) == {
        ("a", "b"): 0.25,
        ("a", "x"): 0.5,
        ("b", "x"): 0.5,
        ("c", "x"): 0.5,
        ("a", "y"): 0.5,
        ("b", "y"): 0.5,
        ("c", "y"): 0.5,
        ("x", "y"): 0.5,
    }


def test_a_text_of_nobody_is_every_pair() -> None:
    names = list("abcdefg")
    assert named(GivenGraph.parsed(" , "), names) == dict.fromkeys(itertools.combinations(names, 2), 0.5)
    assert named(GivenGraph.parsed(""), ["a"]) == named(GivenGraph.parsed(""), []) == {}


def test_those_who_come_later_are_asked_for_alone() -> None:
    given, names = GivenGraph.parsed("a b 0.25, c b 0.75"), ["a", "b", "x", "c"]
    whole = Graph.empty().grown(4, *given.among(names, 0, 0.5))

    step_by_step = Graph.empty()
    for first, last in ((0, 1), (1, 3), (3, 4)):
        step_by_step = step_by_step.grown(last, *given.among(names[:last], first, 0.5))

    assert torch.equal(whole.matrix(range(4)), step_by_step.matrix(range(4)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b 1, a a 1", 'graph has "a a 1": a pair is of two members'),
        ("a b 1.5", 'graph has "a b 1.5": a weight lies in'),
        ("a b nan", 'graph has "a b nan": a weight lies in'),
        ("a b 0.5, b a 0.25", "graph has two weights for a and b: 0.5 and 0.25"),
        ("a b", 'graph has "a b", neither'),
        ("a b c d", 'graph has "a b c d", neither'),
        ("a b 1 1", 'graph has "a b 1 1", neither'),
        ("a b one", 'graph has "a b one", neither'),
    ],
)
def test_what_is_no_graph_is_named(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected.split(",")[0].replace("[", r"\[")):
        GivenGraph.parsed(text)
