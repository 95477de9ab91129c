"""A run among organisations against the simulation of the same recipe, and members that do not come or agree."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from allmend.consortium.gathering import TELL_AGAIN, WaitLog
from allmend.consortium.member import FEWEST_SCORED, MemberSide
from allmend.consortium.offer import Offer
from allmend.errors import UserError
from allmend.events import Joined, RunFinished, Waiting, Warned
from allmend.federation.engines.wire import dump_reply, dump_task
from allmend.federation.privacy.accounting import Release, epsilon
from allmend.life import tune
from allmend.models.load import load_model
from allmend.models.tensors import dump, parse
from allmend.recipe import make_recipe
from allmend.results import BASE, POOLED, AuditTable, PrivacyTable, UtilityTable
from allmend.run import EventLog
from allmend.session import Session
from allmend.strategy import Reply, Task, Turn

MakePlace = Callable[..., Any]

COBO = {"name": "cobo", "rounds": 2, "geometry": "factors"}


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_run_is_that_of_the_simulation(make_place: MakePlace) -> None:
    place = make_place()
    there = place.coordinate()
    here = tune(place.recipe, place.folder / "simulated", base=place.folder)
    assert adapter(there.arm("fedavg")) == adapter(here.arm("fedavg"))
    # every member has the shared model, and its own as the simulation has it
    for name, side in place.sides.items():
        (site,) = (side.folder / "runs").iterdir()
        assert adapter(site / "arms/fedavg") == adapter(here.arm("fedavg"))
        mine, simulated = (
            load_file(path / "adapter" / "adapter_model.safetensors")
            for path in (site / "arms/local", here.arm("local") / "members" / name)
        )
        assert all((mine[key] == simulated[key]).all() for key in simulated)
    assert not (there.path / "arms/local/members").exists()
    tables = [run.read_table("utility", UtilityTable) for run in (there, here)]
    assert tables[0] is not None
    assert tables[1] is not None
    for model in (BASE, "fedavg"):
        rows = [next(r for r in table.rows if (r.model, r.held_out) == (model, POOLED)) for table in tables]
        assert rows[0].accuracy == rows[1].accuracy
        assert rows[0].perplexity.value == pytest.approx(rows[1].perplexity.value, rel=1e-6)
        assert rows[0].perplexity.low == pytest.approx(rows[1].perplexity.low, rel=1e-4)
    audits = [run.read_table("audit", AuditTable) for run in (there, here)]
    assert audits[0].gaps == audits[1].gaps
    assert audits[0].learnt == audits[1].learnt
    assert (there.path / "report.html").exists()


def test_nothing_of_a_members_records_is_with_the_coordinator(make_place: MakePlace) -> None:
    place = make_place()
    run = place.coordinate()
    for path in run.path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for name in place.sides:
                assert f"{name}-3".encode() not in data
                assert f"{name}: 3".encode() not in data


def test_a_run_that_is_there_goes_on_and_a_finished_one_asks_nobody_to_train(make_place: MakePlace) -> None:
    place = make_place()
    whole = place.coordinate("whole")
    trained: list[Any] = []
    for side in place.sides.values():
        side.on_step = lambda *step: trained.append(step)
        side.folder = side.folder.with_name(f"{side.folder.name}-again")
        side._joined = None
    place.post.answer = {name: side.answer for name, side in place.sides.items()}

    class Stop(Exception):  # noqa: N818
        pass

    rounds = 0

    def dying(name: str, answer: Any) -> Any:
        def carry(question: bytes) -> bytes:
            nonlocal rounds
            if b'"ask":"work"' in question.replace(b" ", b"").replace(b"\\", b""):
                rounds += 1
                if rounds == 5:  # in the second round
                    raise Stop
            return answer(question)

        return carry

    alive = dict(place.post.answer)
    place.post.answer = {name: dying(name, answer) for name, answer in alive.items()}
    with pytest.raises(Stop):
        place.coordinate("again")
    place.post.answer = alive
    again = place.coordinate("again")
    assert adapter(again.arm("fedavg")) == adapter(whole.arm("fedavg"))
    before = len(trained)
    place.coordinate("again")
    assert len(trained) == before
    assert len(place.asked) == 6  # consent is asked for once in each folder


def test_too_few_members_are_told_one_by_one(make_place: MakePlace) -> None:
    place = make_place(agree=False)
    place.post.absent = {"south"}
    with pytest.raises(UserError, match="0 of 3 members have joined, and 2 are the fewest") as raised:
        place.coordinate()
    assert "east: declined" in str(raised.value)
    assert "south: did not come" in str(raised.value)


def test_who_has_declined_may_think_again_while_there_are_too_few(make_place: MakePlace) -> None:
    place = make_place()
    answers = {"north": [False, False, True]}

    def decide(name: str) -> Callable[..., bool]:
        return lambda *what: answers[name].pop(0) if answers.get(name) else True

    for name, side in place.sides.items():
        side.agree = decide(name)
    run = place.coordinate(fewest=3)
    assert [event.members for event in run.history() if isinstance(event, Joined)] == [["east", "north", "south"]]
    told = [event.message for event in run.history() if isinstance(event, Warned) and "declined" in event.message]
    assert told == ["north: declined; it may join as long as others are waited for"]


def test_nobody_is_waited_for_who_has_declined_where_enough_have_joined(make_place: MakePlace) -> None:
    place = make_place(canaries={"copies": [2], "count": 3, "clients": ["east", "south"]})
    place.sides["north"].agree = lambda *what: False
    run = place.coordinate(fewest=2, join=1000.0)
    assert [event.members for event in run.history() if isinstance(event, Joined)] == [["east", "south"]]
    assert place.post.now < 100


def test_a_member_with_few_held_out_records_sends_no_sums_over_them(make_place: MakePlace) -> None:
    """The sum over a single record is that record's."""
    place = make_place()
    path = place.folder / "east.jsonl"
    rows = [json.loads(line) | {"split": "train"} for line in path.read_text().splitlines()]
    for row in rows[: FEWEST_SCORED - 1]:
        row["split"] = "test"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = place.coordinate().read_table("utility", UtilityTable)
    assert whole is not None
    others = sum(
        sum(1 for line in (place.folder / f"{name}.jsonl").read_text().splitlines()) for name in ("north", "south")
    )
    asked = next(row.accuracy.n for row in whole.rows if row.model == "base" and row.accuracy)
    assert 0 < asked < others


def test_a_member_that_does_not_come_is_left_out(make_place: MakePlace) -> None:
    place = make_place(compare={}, canaries=None)
    place.post.absent = {"south"}
    run = place.coordinate()
    warned = [event.message for event in run.history() if isinstance(event, Warned)]
    assert any("south: did not come" in message for message in warned)
    assert (run.path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("version", "has allmend 9.9"),
        ("model", "other weights"),
        ("name", "no client of this name"),
        ("data", "nowhere"),
    ],
)
def test_what_does_not_fit_is_told_by_the_member(change: str, why: str, make_place: MakePlace, tmp_path: Path) -> None:
    place = make_place()
    side = place.sides["north"]
    answer = place.post.answer["north"]
    if change == "version":
        offer = Offer(place.recipe.to_toml(), (), "x", "9.9")
        said = side.answer(dump({}, {"ask": "offer", **offer.about}))
        assert b"9.9" in said
        return
    if change == "name":
        side.name = "west"
    if change == "data":
        side.data = tmp_path / "nowhere.jsonl"
    if change == "model":
        other = load_model(place.recipe.model.source)
        side.model = replace(other, digest="other")
    assert answer is not None
    with pytest.raises(UserError, match=why):
        place.coordinate(fewest=3)


def test_models_that_stay_with_members_are_not_audited_here(make_place: MakePlace) -> None:
    alone = {"alone": {"strategy": {"name": "local"}}}
    place = make_place(compare=alone, audit={"models": ["fedavg", "alone"]})
    with pytest.raises(UserError, match="alone ends with a model of each member's own, which stays with it"):
        place.coordinate()
    place = make_place(compare={}, strategy={"name": "local", "rounds": 1})
    with pytest.raises(UserError, match="every arm ends with a model of each member's own"):
        place.coordinate()


def test_a_strategy_that_pools_is_refused(make_place: MakePlace) -> None:
    place = make_place(compare={"pooled": {"strategy": {"name": "centralised"}}})
    with pytest.raises(UserError, match="pooled needs all records in one place"):
        place.coordinate()


def test_another_recipe_or_other_members_are_another_run(make_place: MakePlace) -> None:
    place = make_place(compare={}, canaries=None)
    place.coordinate()
    place.recipe = place.recipe.model_copy(update={"seed": 4})
    with pytest.raises(UserError, match="recipe is not what the run was started with"):
        place.coordinate()


def test_behind_masks_the_run_is_that_of_the_simulation_too(make_place: MakePlace) -> None:
    place = make_place(privacy={"secure_aggregation": {"clip": 1.0}}, compare={}, canaries=None)
    seen: list[Any] = []
    for name, answer in list(place.post.answer.items()):
        place.post.answer[name] = lambda question, answer=answer: seen.append(answer(question)) or seen[-1]
    there = place.coordinate(fewest=3)
    here = tune(place.recipe, place.folder / "simulated", base=place.folder)
    assert adapter(there.arm("fedavg")) == adapter(here.arm("fedavg"))
    plain = tune(
        place.recipe.model_copy(update={"privacy": type(place.recipe.privacy)()}),
        place.folder / "plain",
        base=place.folder,
    )
    masked, open_ = (load_file(run.arm("fedavg") / "adapter" / "adapter_model.safetensors") for run in (there, plain))
    for key, tensor in open_.items():
        assert (masked[key] - tensor).abs().max() < 1e-5
    assert adapter(there.arm("fedavg")) != adapter(plain.arm("fedavg"))
    # no answer held what a member sums
    assert seen
    for data in seen:
        tensors, about = parse(data)
        assert not any(name.startswith("summed/update") for name in tensors)
        assert "weight" not in about.get("summed", {})


@pytest.mark.parametrize("ask", ["score", "learnt"])
def test_numbers_that_cannot_be_are_not_believed(ask: str, make_place: MakePlace) -> None:
    place = make_place(compare={})
    honest = place.post.answer["north"]
    lies = {
        "score": Reply(summed_facts={"held_out/asked": 1.0, "held_out/right": 9.0}),
        "learnt": Reply(seen_facts={"somebody else's/steps": 3}),
    }

    def lying(question: bytes) -> bytes:
        return dump_reply(lies[ask]) if parse(question)[1].get("ask") == ask else honest(question)

    place.post.answer["north"] = lying
    if ask == "learnt":
        with pytest.raises(UserError, match="tells of canaries that it does not have"):
            place.coordinate()
        return
    run = place.coordinate()
    assert any("numbers that cannot be" in e.message for e in run.history() if isinstance(e, Warned))


def test_a_question_that_cannot_be_answered_does_not_end_the_member(make_place: MakePlace) -> None:
    place = make_place(compare={}, canaries=None)
    place.coordinate()
    side = place.sides["north"]
    offer = side._joined.offer.digest
    about = {"ask": "work", "run": offer, "arm": "fedavg"}
    for question in (
        b"",
        b"x" * 50,
        dump_task(Task(Turn(9, 0, 9)), about=about),
        dump_task(Task(Turn(1, 7, 1)), about={}),
    ):
        assert "error" in parse(side.answer(question))[1]


def test_records_that_have_changed_are_told(make_place: MakePlace) -> None:
    place = make_place(compare={}, canaries=None)
    place.coordinate()
    side = place.sides["north"]
    rows = side.data.read_text().splitlines()
    side.data.write_text("\n".join(rows[:-1]))
    side._joined = None
    with pytest.raises(UserError, match="the records differ from those that this run was begun with"):
        side.resume()


def test_the_log_tells_who_has_joined(make_place: MakePlace) -> None:
    place = make_place()
    run = place.coordinate()
    (joined,) = (event for event in run.history() if isinstance(event, Joined))
    assert joined.members == sorted(place.sides)


def test_the_log_tells_who_is_away_when_that_changes_and_now_and_then_besides(tmp_path: Path) -> None:
    now = [100.0]
    log = EventLog(tmp_path / "events.jsonl")
    told: list[Waiting] = []
    log.listeners.append(told.append)
    tell = WaitLog(log, clock=lambda: now[0])
    for at, away, count in (
        (101.0, [], 0),  # nothing is amiss
        (102.0, ["b"], 1),
        (103.0, ["b"], 1),
        (104.0, [], 2),  # it is back
        (105.0, [], 2),
        (104.0 + TELL_AGAIN, [], 3),
        (105.0 + TELL_AGAIN, [], 3),
    ):
        now[0] = at
        tell(["a", "b"], away)
        assert len(told) == count
        assert not told or told[-1].members == ["a", "b"]
    assert [event.away for event in told] == [["b"], [], []]
    log.close()


HIDDEN = {"privacy": {"secure_aggregation": {"clip": 1.0}}, "compare": {}, "canaries": None}


def at_step(step: str, *, round: int) -> Callable[[bytes], bool]:
    """Whether a question is one for this step of a sum."""

    def asks(question: bytes) -> bool:
        about = parse(question)[1]
        return (about.get("ask"), about.get("step"), about.get("round")) == ("secure", step, round)

    return asks


@pytest.mark.parametrize("step", ["shares", "masked", "opened"])
def test_a_member_that_begins_anew_in_the_middle_of_a_sum_is_in_it_all_the_same(
    step: str, make_place: MakePlace
) -> None:
    place = make_place(**HIDDEN)
    asks, begun = at_step(step, round=2), []
    old = place.sides["north"]

    def answer(question: bytes) -> bytes:
        if asks(question) and not begun:
            begun.append(MemberSide(old.name, old.identity, old.data, old.folder, old.agree))
            assert begun[0].resume()
        return (begun or [old])[0].answer(question)

    place.post.answer["north"] = answer
    there = place.coordinate(fewest=3)
    here = tune(place.recipe, place.folder / "simulated", base=place.folder)
    assert begun
    assert adapter(there.arm("fedavg")) == adapter(here.arm("fedavg"))
    tried = [event for event in there.history() if isinstance(event, Warned) and "tried again" in event.message]
    assert len(tried) == (step != "opened")  # two of three shares are enough


class Died(Exception):  # noqa: N818
    """The coordinator's process is gone."""


def dies_after_opening(place: Any, *, round: int) -> None:
    """The coordinator dies when all members have opened a sum, and has not learnt it."""
    asks, opened = at_step("opened", round=round), []

    def watched(answer: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def carry(question: bytes) -> bytes:
            found = answer(question)
            if asks(question):
                opened.append(question)
                if len(opened) == len(place.sides):
                    raise Died
            return found

        return carry

    place.post.answer = {name: watched(side.answer) for name, side in place.sides.items()}


def test_a_coordinator_that_dies_while_members_open_a_sum_forms_it_again(make_place: MakePlace) -> None:
    place = make_place(**HIDDEN)
    dies_after_opening(place, round=1)
    with pytest.raises(Died):
        place.coordinate(fewest=3)
    there = place.coordinate(fewest=3)
    here = tune(place.recipe, place.folder / "simulated", base=place.folder)
    assert adapter(there.arm("fedavg")) == adapter(here.arm("fedavg"))


def test_a_sum_that_was_opened_over_somebody_who_is_away_waits_for_it(make_place: MakePlace) -> None:
    """It is never formed over the others: the difference would be somebody's part."""
    place = make_place(names=("east", "north", "south", "west"), **HIDDEN)
    dies_after_opening(place, round=1)
    with pytest.raises(Died):
        place.coordinate(fewest=3)
    place.post.answer = {name: side.answer for name, side in place.sides.items()}
    answer = place.post.answer["north"]
    place.post.answer["north"] = lambda question: b"" if parse(question)[1].get("ask") == "work" else answer(question)
    with pytest.raises(UserError, match="was begun to be opened, and is not whole: north did not answer"):
        place.coordinate(fewest=3)
    place.post.answer["north"] = answer
    there = place.coordinate(fewest=3)
    here = tune(place.recipe, place.folder / "simulated", base=place.folder)
    assert adapter(there.arm("fedavg")) == adapter(here.arm("fedavg"))


def test_a_member_works_on_the_rounds_that_it_agreed_to_alone(make_place: MakePlace) -> None:
    place = make_place(compare={}, canaries=None)
    place.coordinate()
    side = place.sides["north"]
    about = {"ask": "work", "run": side._joined.offer.digest, "arm": "fedavg"}
    tensors = {"x": torch.zeros(1)}
    for turn in (Turn(3, 0, 2), Turn(1, 1, 2), Turn(1, 0, 10**9), Turn(1, 0, 1)):
        told = parse(side.answer(dump_task(Task(turn, tensors), about=about)))[1]
        assert "the arm has 2 rounds of 1 legs" in told["error"]["what"]


@pytest.mark.parametrize("strategy", [{"name": "fedavg", "rounds": 2}, COBO])
def test_where_b_alone_learns_the_run_is_that_of_the_simulation(
    strategy: dict[str, Any], make_place: MakePlace
) -> None:
    place = make_place(strategy=strategy, adapter={"rank": 2, "learns": "b"}, canaries=None)
    sent: list[bytes] = []
    for name, answer in place.post.answer.items():
        place.post.answer[name] = lambda question, answer=answer: sent.append(question) or answer(question)
    there, here = place.coordinate(), tune(place.recipe, place.folder / "simulated", base=place.folder)
    for name, side in place.sides.items():
        (site,) = (side.folder / "runs").iterdir()
        arm = strategy["name"]
        simulated = here.arm(arm) if arm == "fedavg" else here.arm(arm) / "members" / name
        assert adapter(site / "arms" / arm) == adapter(simulated)
    assert strategy is COBO or adapter(there.arm("fedavg")) == adapter(here.arm("fedavg"))
    travelled = {tensor for question in sent for tensor in parse(question)[0]}
    assert any("lora_B" in tensor for tensor in travelled)
    assert not any("lora_A" in tensor for tensor in travelled)


def test_a_member_works_beside_no_other_a_than_the_coordinators(make_place: MakePlace) -> None:
    place = make_place(adapter={"rank": 2, "learns": "b"}, compare={}, canaries=None)
    place.coordinate()
    side = place.sides["north"]
    about = {"ask": "work", "run": side._joined.offer.digest, "arm": "fedavg"}
    for frozen in ({}, {"frozen": "0" * 64}):
        told = parse(side.answer(dump_task(Task(Turn(1, 0, 2), {"x": torch.zeros(1)}), about=about | frozen)))[1]
        assert "came out otherwise here" in told["error"]["what"]
        assert "version of torch" in told["error"]["hint"]


def test_fewer_members_than_a_sum_needs_are_told_before_anything_begins(make_place: MakePlace) -> None:
    place = make_place(**HIDDEN | {"privacy": {"secure_aggregation": {"fewest": 4}}})
    with pytest.raises(UserError, match="4 members are the fewest, and 3 are registered"):
        place.coordinate(fewest=2)
    assert place.post.count == 0


def test_a_disk_without_room_for_a_round_is_told_before_anything_begins(
    make_place: MakePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(compare={}, canaries=None)
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(UserError, match=r"0.01 GB are free on this disk, and a round of 3 members needs up to 0.02 GB"):
        place.coordinate()
    assert place.post.count == 0
    monkeypatch.undo()
    place.coordinate()


@pytest.mark.parametrize("randomness", ["seeded", "secure"])
def test_behind_masks_members_add_the_noise_of_their_guarantee(randomness: str, make_place: MakePlace) -> None:
    privacy = {
        "member": {"clip": 0.05, "noise_multiplier": 0.5},
        "secure_aggregation": {},
        "randomness": randomness,
    }
    place = make_place(**HIDDEN | {"privacy": privacy})
    there = place.coordinate(fewest=3)
    table = there.read_table("privacy", PrivacyTable)
    assert table is not None
    (budget,) = table.budgets["fedavg"]
    assert budget.epsilon == pytest.approx(epsilon(Release(0.5, skellam=True), 2, budget.delta))
    noisy = load_file(there.arm("fedavg") / "adapter" / "adapter_model.safetensors")
    here = tune(place.recipe, place.folder / "simulated", base=place.folder)
    assert (adapter(there.arm("fedavg")) == adapter(here.arm("fedavg"))) == (randomness == "seeded")
    quiet = {**privacy, "member": {"clip": 0.05, "noise_multiplier": 0.0}, "randomness": "seeded"}
    values = {**place.recipe.model_dump(exclude_none=True, exclude_unset=True), "privacy": quiet}
    plain = tune(make_recipe(values), place.folder / "quiet", base=place.folder)
    still = load_file(plain.arm("fedavg") / "adapter" / "adapter_model.safetensors")
    spread = torch.cat([(noisy[name] - still[name]).flatten() for name in still]).std().item()
    assert 0.3 < spread / (math.sqrt(2) * 0.5 * 0.05 / 3) < 3  # two rounds of noise, over three members
    if randomness == "secure":
        (site,) = (place.sides["north"].folder / "runs").iterdir()
        assert (site / "noise.key").stat().st_mode & 0o077 == 0


def test_a_coordinator_that_dies_before_the_report_needs_nobody_to_write_it(
    make_place: MakePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members have left by then."""
    place = make_place(compare={}, canaries=None)

    def died(run: Path) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("allmend.session.write_report", died)
        with pytest.raises(Died):
            place.coordinate()
    place.post.absent = set(place.sides)
    before = place.post.now
    run = place.coordinate()
    assert (run.path / "report.html").exists()
    assert place.post.now - before < 60


def test_layers_and_noise_on_the_weights_are_those_of_the_recipe(make_place: MakePlace) -> None:
    """The table names the layers without the members' counts; the model has its noise before anybody is sent it."""
    privacy = {"goldfish": {"k": 3}, "deduplicate": {}, "weight_noise": 0.01, "secure_aggregation": {}}
    place = make_place(**HIDDEN | {"privacy": privacy})
    there = place.coordinate(fewest=3)
    here = tune(place.recipe, place.folder / "simulated", base=place.folder)
    assert adapter(there.arm("fedavg")) == adapter(here.arm("fedavg"))
    for side in place.sides.values():
        (site,) = (side.folder / "runs").iterdir()
        assert adapter(site / "arms/fedavg") == adapter(here.arm("fedavg"))
    table = there.read_table("privacy", PrivacyTable)
    assert table is not None
    words = " ".join(table.layers["fedavg"])
    for layer in ("deduplication", "Goldfish loss (k = 3", "secure aggregation", "weight noise"):
        assert layer in words
    assert words.count("members keep the counts to themselves") == 2
    page = (there.path / "report.html").read_text()
    assert "secure aggregation" in page
    assert "Members keep the numbers of their records to themselves" in page
    assert "Memorisation was not audited" not in page  # there is nothing to audit


def test_noise_on_the_weights_is_for_a_shared_model(make_place: MakePlace) -> None:
    place = make_place(privacy={"weight_noise": 0.01})
    with pytest.raises(UserError, match="for the model that all share, and local makes each member its own"):
        place.coordinate()


def test_a_run_took_as_long_as_all_its_sessions(make_place: MakePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(compare={}, canaries=None)
    monkeypatch.setattr("allmend.consortium.coordinator.sessions", lambda run: [Session(1, 1000.0)])
    finished = [event for event in place.coordinate().history() if isinstance(event, RunFinished)]
    assert finished[-1].seconds > 1000


def test_rounds_that_draw_fewer_members_than_must_answer_are_told_before_anything_begins(
    make_place: MakePlace,
) -> None:
    place = make_place(strategy={"name": "fedavg", "rounds": 2, "participation": 0.4}, compare={}, canaries=None)
    with pytest.raises(UserError, match="round 1 of arm 'fedavg' has 1 of 3 members, and 2 are the fewest"):
        place.coordinate()
    assert not (place.folder / "run").exists()
    place.coordinate(fewest=1)
