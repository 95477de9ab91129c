"""Whose data helped among organisations: the figures of the simulation, with nothing of a record at the coordinator."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.attribution.runs import FOLDER
from allmend.consortium.afterwards import attribute_members
from allmend.consortium.gathering import Patience
from allmend.consortium.influence import PREFIX
from allmend.errors import UserError
from allmend.federation.engines.flower.exchange import Exchange
from allmend.federation.engines.wire import dump_task
from allmend.influence.table import ROWS, read_scores
from allmend.life import tune
from allmend.models.tensors import parse
from allmend.results import ArmInfluence, InfluenceByMember
from allmend.run import RunFolder
from allmend.strategy import Task, Turn

MakePlace = Callable[..., Any]

SETTINGS = {"reveal": "client_sums", "min_records": 4}
SHORT: dict[str, Any] = {"strategy": {"name": "fedavg", "rounds": 1}, "compare": {}, "canaries": None}


def write_asked(folder: Path) -> None:
    rows = [{"id": f"asked-{i}", "prompt": f"asked: {i}", "response": f"{3 * i}"} for i in range(5)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arm_of(run: RunFolder) -> ArmInfluence:
    table = run.read_table("influence", InfluenceByMember)
    assert table is not None
    (arm,) = table.arms
    return arm


def scores_in(folder: Path) -> dict[str, float]:
    return {row.record_id: float(row.score or 0) for row in read_scores(folder / ROWS)}


def at_member(place: Any, name: str) -> dict[str, float]:
    (found,) = place.sides[name].folder.glob(f"runs/*/arms/fedavg/{FOLDER}")
    assert "was scored" not in (found / "influence.html").read_text()
    return scores_in(found)


def apart(first: dict[str, float], second: dict[str, float]) -> float:
    assert first.keys() == second.keys()
    a, b = (torch.tensor([one[key] for key in sorted(first)], dtype=torch.float64) for one in (first, second))
    return float((a - b).norm() / b.norm())


def afterwards(place: Any, changes: dict[str, Any], **more: Any) -> InfluenceByMember:
    @contextlib.contextmanager
    def open_exchange(run: Path) -> Iterator[Exchange]:
        yield Exchange(place.post, clock=lambda: place.post.now, sleep=place.post.sleep)

    return attribute_members(
        place.folder / "run",
        place.keys,
        changes=changes,
        open_exchange=open_exchange,
        patience=Patience(100.0, 100.0, 2),
        **more,
    )


def test_members_come_to_the_scores_of_the_simulation_behind_masks(make_place: MakePlace) -> None:
    place = make_place(influence=SETTINGS | {"target": "asked.jsonl"})
    write_asked(place.folder)
    there, here = place.coordinate(), tune(place.recipe, place.folder / "simulated", base=place.folder)
    for name in place.sides:
        assert apart(at_member(place, name), scores_in(here.arm("fedavg") / FOLDER / name)) < 1e-6
    one, other = arm_of(there), arm_of(here)
    assert one.hidden
    assert not other.hidden
    assert one.error is not None
    assert one.error < 1e-6
    assert (one.records, one.target, one.target_records) == (other.records, "asked.jsonl", 5)
    for a, b in zip(one.members, other.members, strict=True):
        assert (a.client, a.mean.n, a.below) == (b.client, b.mean.n, b.below)
        assert a.mean.value == pytest.approx(b.mean.value, rel=1e-4)
    assert "Whose data helped" in (there.path / "report.html").read_text()


def test_where_b_alone_learns_both_sides_take_its_gradients_alone(make_place: MakePlace) -> None:
    """The coordinator reads from the adapter's folder what learnt, and members from the recipe."""
    place = make_place(influence=SETTINGS, **SHORT, adapter={"rank": 2, "learns": "b"})
    there, here = place.coordinate(), tune(place.recipe, place.folder / "simulated", base=place.folder)
    for name in place.sides:
        assert apart(at_member(place, name), scores_in(here.arm("fedavg") / FOLDER / name)) < 1e-6
    assert arm_of(there).records == arm_of(here).records


def test_nothing_of_a_record_is_with_the_coordinator_nor_a_score(make_place: MakePlace) -> None:
    place = make_place(influence={"min_records": 4})
    answers: list[bytes] = []

    def overheard(answer: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def carry(question: bytes) -> bytes:
            answers.append(answer(question))
            return answers[-1]

        return carry

    place.post.answer = {name: overheard(answer) for name, answer in place.post.answer.items()}
    run = place.coordinate()
    assert arm_of(run).members == ()
    assert not (run.arm("fedavg") / FOLDER).exists()
    scores = [score for name in place.sides for score in at_member(place, name).values()]
    kept = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    for data in (*kept, *answers):
        assert not any(f"{name}-3".encode() in data for name in place.sides)
        assert not any(repr(score).encode() in data for score in scores)
    # what members answered in the legs has no sums in sight
    for data in answers:
        tensors, about = parse(data)
        if str(about.get("arm", "")).startswith(PREFIX):
            assert not tensors


def test_a_member_is_asked_about_arms_that_it_has_agreed_to_alone(make_place: MakePlace) -> None:
    place = make_place()
    place.coordinate()
    side = place.sides["east"]
    digest = side._joined.offer.digest
    for arm in ("fedavg", "local", "nowhere"):
        about = {"ask": "work", "run": digest, "arm": PREFIX + arm}
        answer = parse(side.answer(dump_task(Task(Turn(1, 0, 1, 3)), about=about)))[1]
        assert "no arm is called" in answer["error"]["what"]


@pytest.mark.parametrize("method", ["datainf", "hessian_free"])
def test_other_methods_come_to_the_scores_of_the_simulation_too(make_place: MakePlace, method: str) -> None:
    clip = {"clip": 0.05} if method == "datainf" else {}
    place = make_place(influence=SETTINGS | clip | {"method": method}, **SHORT)
    there, here = place.coordinate(), tune(place.recipe, place.folder / "simulated", base=place.folder)
    for name in place.sides:
        assert apart(at_member(place, name), scores_in(here.arm("fedavg") / FOLDER / name)) < 1e-5
    one, other = arm_of(there), arm_of(here)
    assert one.hidden
    assert one.error is not None
    assert one.error < 1e-5
    assert (one.method, one.records, one.clipped, one.gradients) == (
        method,
        other.records,
        other.clipped,
        other.gradients,
    )
    assert bool(one.clipped) == bool(clip)
    assert [leg.name for leg in one.legs] == [leg.name for leg in other.legs]
    asked = place.asked[-1][1].influence
    assert (asked.method, asked.clip) == (method, clip.get("clip")), "members are shown what they agree to"


def test_kinds_are_not_agreed_on_by_datainf(make_place: MakePlace) -> None:
    place = make_place(influence=SETTINGS | {"target": "asked.jsonl", "targets": "kind", "method": "datainf"})
    write_asked(place.folder)
    with pytest.raises(UserError, match="before they know the kinds"):
        place.coordinate()


def test_a_run_that_has_ended_is_asked_again_with_consent(make_place: MakePlace) -> None:
    place = make_place()
    write_asked(place.folder)
    run = place.coordinate()
    assert len(place.asked) == 3
    changes = SETTINGS | {"target": str(place.folder / "asked.jsonl")}
    (arm,) = afterwards(place, changes).arms
    assert len(place.asked) == 6  # each member anew, with the section in the recipe that it is shown
    assert {asked[1].influence.target for asked in place.asked[3:]} == {"asked.jsonl"}
    assert [one.client for one in arm.members] == ["east", "north", "south"]
    assert arm_of(run) == arm
    same = afterwards(place, changes)  # the same question comes to the same sums
    assert same.arms[0].members == arm.members
    assert len(place.asked) == 6


def test_a_sum_over_other_members_needs_a_word(make_place: MakePlace) -> None:
    place = make_place(names=("east", "north", "south", "west"), **SHORT)
    write_asked(place.folder)
    place.coordinate()
    afterwards(place, SETTINGS)
    alone = SETTINGS | {"method": "hessian_free", "target": str(place.folder / "asked.jsonl")}
    afterwards(place, alone)
    place.post.absent = {"west"}
    with pytest.raises(UserError, match=r"west would make the difference"):
        afterwards(place, SETTINGS | {"damping": 0.2})
    afterwards(place, alone | {"damping": 0.2})  # sums nothing of a member, and what was summed before stays in mind
    with pytest.raises(UserError, match=r"size and target were summed .* west would make the difference"):
        afterwards(place, SETTINGS | {"method": "datainf"})
    with pytest.raises(UserError, match=r"target were summed .* west would make the difference"):
        afterwards(place, SETTINGS | {"method": "hessian_free"})
    (arm,) = afterwards(place, SETTINGS | {"damping": 0.2}, again=True).arms
    assert arm.legs[1].members == ("east", "north", "south")


def test_a_sum_of_other_records_of_the_same_members_needs_a_word(make_place: MakePlace) -> None:
    place = make_place(**SHORT)
    place.coordinate()
    afterwards(place, SETTINGS)
    with pytest.raises(UserError, match=r"no clip before, and now with clip = 0\.5"):
        afterwards(place, SETTINGS | {"clip": 0.5})
    with pytest.raises(UserError, match="min_records = 4 before, and now with 21"):
        afterwards(place, SETTINGS | {"min_records": 21})
    afterwards(place, SETTINGS | {"clip": 0.5}, again=True)


def test_a_member_that_is_lost_on_the_way_opens_no_sum_over_fewer(make_place: MakePlace) -> None:
    place = make_place(names=("east", "north", "south", "west"), **SHORT)
    place.coordinate()
    afterwards(place, SETTINGS)
    answer = place.post.answer["west"]

    def joins_and_goes(question: bytes) -> bytes:
        if parse(question)[1].get("ask") == "work":
            place.post.absent.add("west")
        return answer(question)

    place.post.answer = {**place.post.answer, "west": joins_and_goes}
    send = place.post.send
    place.post.send = lambda member, data: None if member in place.post.absent else send(member, data)
    with pytest.raises(UserError, match="west would make the difference"):
        afterwards(place, SETTINGS | {"damping": 0.2})


def test_members_that_opened_a_sum_open_no_other_over_fewer(make_place: MakePlace) -> None:
    place = make_place(names=("east", "north", "south", "west"))
    place.coordinate()
    afterwards(place, SETTINGS)
    place.post.absent = {"west"}
    with pytest.raises(UserError):
        afterwards(place, SETTINGS, again=True)  # the same work as before, over others


def test_who_declines_takes_no_part(make_place: MakePlace) -> None:
    place = make_place()
    place.coordinate()
    for side in place.sides.values():
        side.agree = lambda *what: False
    with pytest.raises(UserError, match="0 of 3 members have joined, and 3 are the fewest"):
        afterwards(place, SETTINGS)
