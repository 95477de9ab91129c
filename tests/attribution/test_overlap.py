"""Records in two places are found by what training makes of them, whatever they are called."""

from dataclasses import replace

import pytest
import torch

from allmend.attribution.overlap import SHOWN, content_digest, overlapping, refuse_overlap, refuse_shared
from allmend.data.chat import Encoded
from allmend.errors import UserError


def record(id: str, *ids: int) -> Encoded:
    place = torch.arange(len(ids))
    return Encoded(id, torch.tensor(ids), place > 0, torch.zeros_like(place), place)


def test_the_digest_is_of_tokens_and_targets_and_not_of_the_id() -> None:
    one = record("a", 1, 2, 3)
    assert content_digest(one) == content_digest(replace(one, id="b", cut=4))
    others = [
        record("a", 1, 2, 4),
        record("a", 1, 2),
        replace(one, target=torch.tensor([False, False, True])),
        replace(one, branch=torch.tensor([0, 0, 1])),
        replace(one, position=torch.tensor([0, 1, 1])),
    ]
    assert len({content_digest(other) for other in (one, *others)}) == 6


def test_one_content_at_two_clients_is_refused_with_both_names() -> None:
    records = [record("a", 1, 2), record("b", 3, 4), record("c", 1, 2)]
    refuse_shared(["north", "north", "north"], records)  # twice at one client is that client's matter
    with pytest.raises(UserError, match="record 'c' of south has the same content as record 'a' of north"):
        refuse_shared(["north", "north", "south"], records)


def test_target_records_among_the_training_records_are_refused_with_their_ids() -> None:
    train = [record("a", 1, 2), record("b", 3, 4), record("b again", 3, 4)]
    target = [record("x", 5, 6), record("b", 3, 4), record("y", 1, 2)]
    shared = overlapping(train, target)
    assert shared == {1: "b", 2: "a"}
    with pytest.raises(UserError, match=r"2 of 3 target records are training records too: b, y \(a there\)") as raised:
        refuse_overlap(shared, target)
    assert "--drop-overlap" in str(raised.value)
    refuse_overlap({}, target)


def test_long_lists_are_cut() -> None:
    target = [record(f"r{i}", i, i) for i in range(SHOWN + 2)]
    with pytest.raises(UserError, match=r"r0, r1, r2, r3, r4 and 2 more"):
        refuse_overlap(overlapping(target, target), target)
