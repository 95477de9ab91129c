"""FedAvg in groups that are told: each group is a federation of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from allmend.events import RoundDone
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.grouped import Grouped
from allmend.federation.strategies.local import Local
from allmend.federation.strategies.several import RETURN, TRAIN
from allmend.recipe import Train
from allmend.strategy import State, Turn, of_group


def test_each_group_is_fedavg_of_its_members_and_the_others_are_local_bit_for_bit(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a"), make_member("b", records=7), make_member("c"), make_member("d", records=3)]
    strategy = Grouped(groups="a c, b", others="alone")
    found = run(strategy, members, settings, rounds=3)
    for place, names in enumerate(("ac", "b")):
        alone = run(FedAvg(), [one for one in members if one.name in names], settings, rounds=3)
        shared = of_group("model", alone.state.tensors)
        assert all(torch.equal(found.state.tensors[f"model-{place}/{name}"], one) for name, one in shared.items())
        for name in names:
            own = strategy.personal(State(), found.states[name])
            assert own is not None
            assert all(torch.equal(own[key], tensor) for key, tensor in shared.items())
    local = Local().personal(State(), run(Local(), [members[3]], settings, rounds=3).states["d"])
    assert local is not None
    assert all(torch.equal(strategy.personal(State(), found.states["d"])[n], t) for n, t in local.items())  # type: ignore[index]


def test_one_group_of_all_is_fedavg(run: Callable[..., Any], make_member: Callable[..., Any], settings: Train) -> None:
    members = [make_member("a"), make_member("b", records=7)]
    found, plain = (run(strategy, members, settings, rounds=2) for strategy in (Grouped(groups="b a"), FedAvg()))
    for name, tensor in of_group("model", plain.state.tensors).items():
        assert torch.equal(found.state.tensors[f"model-0/{name}"], tensor)
    # the model comes once more at the end
    sent = [[event.sent["a"] for event in one.events if isinstance(event, RoundDone)] for one in (found, plain)]
    assert sent[0] == [sent[1][0], 2 * sent[1][1]]


def test_a_share_of_each_group_takes_part_and_all_of_it_has_the_outcome() -> None:
    strategy = Grouped(groups="a b c d, e f", participation=0.5)
    state, names = strategy.init({"x": torch.zeros(3)}), list("abcdef")
    drawn = [set(strategy.plan(state, Turn(number, TRAIN, 9), names)) for number in range(1, 10)]
    assert {(len(some & set("abcd")), len(some & set("ef"))) for some in drawn} == {(2, 1)}
    assert len(set(map(frozenset, drawn))) > 2
    assert list(strategy.plan(state, Turn(9, RETURN, 9), names)) == names
    assert strategy.fewest(names) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "groups names nobody"),
        ({"groups": " , "}, "groups names nobody"),
        ({"groups": "a b, c a"}, "groups names a twice"),
        ({"groups": "a", "others": "drop"}, "others must be refuse or alone, got 'drop'"),
        ({"groups": "a", "participation": 0.0}, "participation"),
    ],
)
def test_impossible_groups_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Grouped(**options)


def test_groups_are_of_the_clients_that_there_are() -> None:
    Grouped(groups="a b, c").check(["a", "b", "c"])
    Grouped(groups="a b", others="alone").check(["a", "b", "c"])
    with pytest.raises(ValueError, match="groups names z, and there are the clients a, b"):
        Grouped(groups="a b z").check(["a", "b"])
    with pytest.raises(ValueError, match=r'c: in no group.+ set others = "alone"'):
        Grouped(groups="a b").check(["a", "b", "c"])
