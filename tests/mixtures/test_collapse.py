"""When a router counts as collapsed."""

import math

import pytest

from allmend.mixtures.collapse import collapsed, ranges
from allmend.results import Estimate, MemberRouting


def member(*masses: float, shared: int = 1, own: int = 1) -> MemberRouting:
    """Gates with this weight of the generalists in each layer, equal among generalists and among specialists."""
    gates = [
        *(
            tuple([mass / shared] * shared if shared else []) + tuple([(1 - mass) / own] * own if own else [])
            for mass in masses
        )
    ]
    return MemberRouting(
        member="north",
        records=3,
        shared=shared,
        own=own,
        mass=tuple(Estimate(value=mass, n=10) for mass in masses),
        overall=Estimate(value=math.fsum(masses) / len(masses), n=10),
        gates=tuple(gates),
    )


def said(*masses: float, **experts: int) -> list[str]:
    return collapsed("comigs", member(*masses, **experts), [5 + place for place in range(len(masses))])


@pytest.mark.parametrize(
    ("masses", "words"),
    [
        ([0.009] * 9 + [0.5], "less than 1% of the weight in 9 of 10 layers (5–13)"),
        ([0.5] + [0.991] * 9, "more than 99% of the weight in 9 of 10 layers (6–14)"),
        ([0.009] * 10, "in 10 of 10 layers (5–14)"),
    ],
)
def test_one_side_with_the_weight_in_nine_tenths_of_the_layers_is_told(masses: list[float], words: str) -> None:
    (sentence,) = said(*masses)
    assert sentence.startswith("arm 'comigs', client 'north': ")
    assert words in sentence
    assert "Raise strategy.balance" in sentence


def test_less_than_that_is_not() -> None:
    assert said(*[0.009] * 8, 0.5, 0.5) == []
    assert said(*[0.011] * 10) == []
    assert said(*[0.989] * 10) == []
    assert said(*[0.009] * 5, *[0.991] * 5) == [], "the layers do not go to one side"


def test_a_layer_in_which_one_expert_has_everything_is_named() -> None:
    (sentence,) = said(0.5, 0.0001, 0.5, 0.4, 1.0)
    assert "one expert has all the weight in layers 6, 9." in sentence
    (sentence,) = said(0.5, 0.9999)
    assert "in layer 6." in sentence
    # −Σ ḡ ln ḡ crosses 0.01 between these two
    assert [bool(said(0.5, mass)) for mass in (0.0013, 0.0016)] == [True, False]


def test_equal_use_of_the_experts_on_one_side_is_no_collapse_within_it() -> None:
    assert said(*[1.0] * 3, shared=2, own=0) == [], "without specialists the generalists' weight is 1 by itself"
    assert said(*[0.0] * 3, shared=0, own=3) == []


def test_without_a_router_nothing_can_collapse() -> None:
    assert said(*[1.0] * 3, shared=1, own=0) == []
    assert said(*[0.0] * 3, shared=0, own=1) == []


def test_entropy_is_that_of_the_mean_gates() -> None:
    assert member(0.5).entropy(0) == pytest.approx(math.log(2))
    assert member(1 / 3, own=2).entropy(0) == pytest.approx(math.log(3))
    assert member(1.0).entropy(0) == 0


def test_numbers_in_a_row_are_told_by_their_ends() -> None:
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0–3, 7, 9–10"
