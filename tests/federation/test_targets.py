"""What a member's routers learn from: its target, or records that no expert is fitted to."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmend.data.chat import Encoded
from allmend.federation.member import LEARNT, Member, MemberClient, set_apart
from allmend.federation.privacy.layers import protected
from allmend.learn.alternating import Alternation, RouterSettings
from allmend.models.mixture import Mixture, apply_mixture, role
from allmend.models.mixture_layers import MixtureConfig
from allmend.recipe import Goldfish, Privacy, Train
from allmend.strategy import Turn


def record(text: str, *, learns: bool = True) -> Encoded:
    ids = torch.tensor([ord(letter) for letter in text])
    target = torch.arange(len(ids)) > (0 if learns else len(ids))
    return Encoded(text, ids, target, torch.zeros_like(ids), torch.arange(len(ids)))


@given(
    st.lists(st.sampled_from(["aa", "bb", "cc", "dd", "ee"]), max_size=30), st.floats(0.01, 0.99), st.integers(0, 99)
)
def test_records_that_are_alike_are_on_one_side(texts: list[str], share: float, seed: int) -> None:
    records = [record(text) for text in texts]
    apart = set_apart(records, share, seed)
    rest = [text for place, text in enumerate(texts) if place not in apart]
    assert apart == sorted(set(apart))
    assert {texts[place] for place in apart}.isdisjoint(rest)
    if len(set(texts)) > 1:
        assert apart
        assert rest
    else:
        assert not apart, "nothing can be set apart of one text"


@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 99))
def test_of_different_records_it_is_the_share_that_is_asked_for(count: int, share: float, seed: int) -> None:
    records = [record(f"{place:03}") for place in range(count)]
    assert len(set_apart(records, share, seed)) == min(max(1, round(share * count)), count - 1)
    assert set_apart(records, share, seed) == set_apart(records, share, seed)


def test_what_teaches_nothing_is_not_set_apart() -> None:
    records = [record("none", learns=False), record("one"), record("two"), record("nil", learns=False)]
    assert all(set(set_apart(records, share, 3)) < {1, 2} for share in (0.1, 0.5, 0.99))


@pytest.fixture
def make_mixture(make_tiny_model: Callable[..., Any]) -> Callable[[], Mixture]:
    config = MixtureConfig(rank=2)
    return lambda: apply_mixture(make_tiny_model(), config, seed=0, specialist_seed=1, digest="")


SETTINGS = Train(learning_rate=0.02, batch_size=2, local_steps=2, schedule="constant", tokens_per_pass=64)
OWN = [record(text) for text in ("north", "winds", "blow", "cold", "today")]
TARGET = tuple(record(text) for text in ("aim", "high"))


def alternated(mixture: Mixture, member: Member) -> tuple[Alternation, MemberClient]:
    client = MemberClient(member, mixture, SETTINGS, mixture.state())
    found = client.alternate(
        client.experts(), Turn(1, 0, 1), RouterSettings(2, 2, 0.01), validation=0.4, experts={}, routers={}
    )
    return found, client


def test_with_a_target_experts_learn_from_all_records_and_routers_from_none(
    make_mixture: Callable[[], Mixture],
) -> None:
    found, client = alternated(make_mixture(), Member("north", OWN, 1, target=TARGET))

    assert found.learnt.shape == (len(OWN), 2)
    assert found.validated.shape == (len(TARGET), 2)
    assert int(found.validated[:, 0].sum()) > 0
    assert torch.equal(client.state.tensors[LEARNT], found.learnt), "the target is not what the audit counts"


def test_another_target_changes_routers_alone(make_mixture: Callable[[], Mixture]) -> None:
    first, _ = alternated(make_mixture(), Member("north", OWN, 1, target=TARGET))
    other, _ = alternated(make_mixture(), Member("north", OWN, 1, target=(record("else"), record("where"))))
    same = {name: torch.equal(tensor, other.tensors[name]) for name, tensor in first.tensors.items()}
    assert all(equal == (role(name) != "router") for name, equal in same.items())


def test_validation_is_the_target_or_what_is_set_apart() -> None:
    member = Member("north", OWN, 1)
    places = set_apart(OWN, 0.4, 1)
    assert [one.id for one in member.validation(0.4)] == [OWN[place].id for place in places]
    assert len(places) == 2
    assert [one.id for one in replace(member, target=TARGET).validation(0.4)] == ["aim", "high"]


def test_goldfish_masks_a_target_too() -> None:
    long = record("a passage that is longer than the context of the hash" * 2)
    (member,), _ = protected(
        [Member("north", OWN, 1, target=(long,))], Privacy(goldfish=Goldfish(k=2, variant="static"))
    )
    left = int(member.target[0].target.sum())
    assert math.isclose(left, int(long.target.sum()) / 2, abs_tol=8)
