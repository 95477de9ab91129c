"""Updates that would spoil the model are left out, as if their member had not been sampled in that round."""

from collections.abc import Callable

import pytest
from tests.consortium.processes import Federation

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

SPOILT = {2: "nan", 4: "huge", 6: "shape", 8: "name"}
WORDS = {
    "nan": ("NaN", r"holds NaN or infinite values"),
    "huge": ("huge values", r"its change has the norm \S+, and train.largest_update is \S+"),
    "shape": ("another shape", r"tensors of other names or shapes than the arm's"),
    "name": ("other names", r"tensors of other names or shapes than the arm's"),
}


def test_they_are_left_out(make_federation: Callable[..., Federation], tell: Callable[..., None]) -> None:
    it = make_federation(rounds=9, train="largest_update = 5.0")
    it.coordinate(fewest=2)
    it.join("east")
    it.join("south")
    it.join("north", faults=[{"kind": "spoil", "rounds": {str(round): how for round, how in SPOILT.items()}}])
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated({round: ["north"] for round in SPOILT})
    for round, how in SPOILT.items():
        what, pattern = WORDS[how]
        said = it.machine.said("coordinator", rf"client 'north', round {round}\b[^\n]*(\n[^\n]*)?{pattern}")
        tell(f"an update with {what}", "left out; the adapter of a run in which it was not sampled then", said)


def test_behind_masks_the_member_itself_keeps_them_back(
    make_federation: Callable[..., Federation], tell: Callable[..., None]
) -> None:
    names = ("east", "north", "south", "west")
    it = make_federation(names=names, rounds=3, more="[privacy.secure_aggregation]")
    it.coordinate(fewest=3)
    for name in ("east", "south", "west"):
        it.join(name)
    it.join("north", faults=[{"kind": "spoil", "rounds": {"2": "nan"}}])
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated({2: ["north"]})
    said = it.machine.said("coordinator", r"goes on without what north worked out")
    tell("an update with NaN behind masks", "its member kept it back; the round went on without it", said)
