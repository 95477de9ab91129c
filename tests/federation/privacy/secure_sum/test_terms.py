import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmend.federation.privacy.secure_sum import Terms


def members(n: int) -> dict[str, bytes]:
    return {f"m{i}": i.to_bytes(32, "little") for i in range(n)}


@settings(max_examples=60, deadline=None)
@given(n=st.integers(3, 200), session=st.text(max_size=5))
def test_the_graph_is_regular_symmetric_and_connected(n: int, session: str) -> None:
    terms = Terms(session=session, members=members(n), length=1)
    near = terms.neighbourhoods
    degree = n - 1 if n <= 32 else 4 * math.ceil(math.log2(n))
    assert set(near) == set(terms.members)
    for name, others in near.items():
        assert len(set(others)) == len(others) == degree == terms.degree
        assert name not in others
        assert all(name in near[other] for other in others)
    reached, front = {"m0"}, ["m0"]
    while front:
        front = [other for name in front for other in near[name] if other not in reached]
        reached |= set(front)
    assert reached == set(near)


def test_seats_are_distinct_and_start_at_1() -> None:
    terms = Terms(session="s", members=members(40), length=1)
    for owner, others in terms.neighbourhoods.items():
        seats = [terms.seat(owner, holder) for holder in (owner, *others)]
        assert sorted(seats) == list(range(1, terms.degree + 2))


def test_everything_changes_the_digest_but_the_order_of_members() -> None:
    terms: dict[str, Any] = {
        "session": "s",
        "members": members(5),
        "length": 3,
        "bits": 32,
        "threshold": 4,
        "fewest": 3,
    }
    digest = Terms(**terms).digest
    assert Terms(**terms | {"members": dict(reversed(members(5).items()))}).digest == digest
    others = {
        "session": "t",
        "members": members(6) | {"m5": bytes(31) + b"\1"},
        "length": 4,
        "bits": 64,
        "threshold": 5,
        "fewest": 4,
    }
    digests = {Terms(**terms | {name: value}).digest for name, value in others.items()}
    assert len(digests | {digest}) == len(others) + 1


def test_the_graph_of_another_session_is_another() -> None:
    graphs = [Terms(session=session, members=members(64), length=1).neighbourhoods for session in "ab"]
    assert graphs[0] != graphs[1]


@pytest.mark.parametrize("n", [3, 4, 5, 16, 17, 33, 100])
def test_the_lowest_threshold_leaves_no_room_for_two_stories(n: int) -> None:
    """Each member tells one story. Two stories about a member, or about it and each of its neighbours, need 2 t."""
    terms = Terms(session="s", members=members(n), length=1)
    needed = terms.lowest_threshold
    whole = {name: {name, *others} for name, others in terms.neighbourhoods.items()}
    rooms = []
    for name, others in terms.neighbourhoods.items():
        own = len(whole[name])  # both secrets of the one
        masks = min(len(whole[name] | whole[other]) for other in others)  # its self-mask and all keys around it
        rooms.append(max(own, masks))
    assert max(rooms) < 2 * needed
    assert max(rooms) >= 2 * (needed - 1)
    assert terms.needed >= needed


def test_the_threshold_is_two_thirds_unless_given() -> None:
    for n, threshold in ((3, 2), (4, 3), (5, 4), (6, 4), (16, 11)):
        assert Terms(session="s", members=members(n), length=1).needed == threshold
    assert Terms(session="s", members=members(5), length=1, threshold=3).needed == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"members": members(2)}, "over 2 members would show"),
        ({"members": members(1)}, "over 1 members"),
        ({"members": {}}, "over 0 members"),
        ({"fewest": 2}, "between 3 and 5, got 2"),
        ({"fewest": 6}, "between 3 and 5, got 6"),
        ({"length": 0}, "one number or more, got 0"),
        ({"bits": 16}, "32 or 64, got 16"),
        ({"threshold": 2}, "between 3 and 5, the whole neighbourhood, got 2"),
        ({"threshold": 6}, "between 3 and 5, the whole neighbourhood, got 6"),
        ({"members": members(5) | {"m3": b"short"}}, "32 bytes, and not that of m3"),
        ({"members": members(5) | {"m3": members(5)["m2"]}}, "the same public key"),
    ],
)
def test_impossible_terms_are_refused(change: dict[str, Any], why: str) -> None:
    terms: dict[str, Any] = {"session": "s", "members": members(5), "length": 1}
    with pytest.raises(ValueError, match=why):
        Terms(**terms | change)
