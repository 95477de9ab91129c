"""A member's site: what it keeps, what it answers, and what no question can make it do."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.federation.arm import at_member
from allmend.federation.engines.wire import dump_task, parse_reply
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.models.tensors import parse
from allmend.recipe import Adapter, Arm, Privacy, RecordPrivacy, StrategyChoice
from allmend.strategy import Task, Turn, of_group


def question(site: Any, strategy: Any, round: int, *, arm: str = "arm", rounds: int = 9, shift: float = 0.0) -> bytes:
    with site.open_arm("arm") as at:
        initial = at.trainable.state()
    tasks = strategy.plan(
        strategy.init({name: t + shift for name, t in initial.items()}), Turn(round, 0, rounds), ["a"]
    )
    return dump_task(tasks["a"], about={"arm": arm})


def test_the_same_question_has_the_same_answer_without_work(
    make_site: Callable[..., Any], make_member: Callable[..., Any]
) -> None:
    site, steps = make_site(make_member("a"), FedAvg()), []
    site.on_step = lambda *step: steps.append(step)
    asked = question(site, FedAvg(), 1)
    first = site.answer(asked)
    worked = len(steps)
    assert worked
    assert site.answer(asked) == first
    assert len(steps) == worked
    other = site.answer(question(site, FedAvg(), 1, shift=0.5))  # the same round with other parameters
    assert other != first
    assert len(steps) == 2 * worked


def test_a_site_that_begins_anew_goes_on_where_it_was(
    make_site: Callable[..., Any], make_member: Callable[..., Any], tmp_path: Path
) -> None:
    whole = make_site(make_member("a"), Local(), tmp_path / "whole")
    answers = [whole.answer(question(whole, Local(), round)) for round in (1, 2, 3)]
    again = []
    for round in (1, 2, 3):
        site = make_site(make_member("a"), Local(), tmp_path / "again")  # killed after each answer
        again.append(site.answer(question(site, Local(), round)))
        site.close()
    assert again == answers
    names = sorted(path.name for path in (tmp_path / "again/arms/arm").iterdir())
    assert names == [f"00000{round}-0.{what}.safetensors" for round in (2, 3) for what in ("answer", "state")]


def test_a_round_that_is_asked_again_starts_from_the_state_before_it(
    make_site: Callable[..., Any], make_member: Callable[..., Any], tmp_path: Path
) -> None:
    """The coordinator died before its checkpoint, and asks for the round again, otherwise."""
    site, fresh = (make_site(make_member("a"), FedAvg(), tmp_path / name) for name in ("one", "other"))
    site.answer(question(site, FedAvg(), 1))
    site.answer(question(site, FedAvg(), 2, shift=0.1))
    fresh.answer(question(fresh, FedAvg(), 1))
    assert site.answer(question(site, FedAvg(), 2)) == fresh.answer(question(fresh, FedAvg(), 2))


def test_a_state_that_is_gone_is_told(make_site: Callable[..., Any], make_member: Callable[..., Any]) -> None:
    site = make_site(make_member("a"), FedAvg())
    for round in (1, 2, 3):
        site.answer(question(site, FedAvg(), round))
    _, about = parse(site.answer(question(site, FedAvg(), 1, shift=1.0)))
    assert "round 1 lies before what this member has kept (from round 2 on)" in about["error"]["what"]


@pytest.mark.parametrize("arm", ["../../outside", "/etc", "", ".", "a/b", "x" * 81, "nul\0"])
def test_a_name_from_the_network_never_becomes_a_path(
    arm: str, make_site: Callable[..., Any], make_member: Callable[..., Any], tmp_path: Path
) -> None:
    site = make_site(make_member("a"), FedAvg(), tmp_path / "in" / "a")
    _, about = parse(site.answer(question(site, FedAvg(), 1, arm=arm)))
    assert "no arm is called" in about["error"]["what"]
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("wrong", [b"", b"rubbish", b"\0" * 100])
def test_rubbish_has_an_answer_too(
    wrong: bytes, make_site: Callable[..., Any], make_member: Callable[..., Any]
) -> None:
    _, about = parse(make_site(make_member("a"), FedAvg()).answer(wrong))
    assert about["error"]["where"] == "the coordinator's question"


def test_parameters_of_another_shape_are_told(make_site: Callable[..., Any], make_member: Callable[..., Any]) -> None:
    site = make_site(make_member("a"), FedAvg())
    task = Task(Turn(1, 0, 1), {"x": torch.zeros(2)})
    _, about = parse(site.answer(dump_task(task, about={"arm": "arm"})))
    assert "lora_A" in about["error"]["what"] or "x is no parameter" in about["error"]["what"]


def test_the_answer_is_the_strategys_reply(make_site: Callable[..., Any], make_member: Callable[..., Any]) -> None:
    site = make_site(make_member("a", records=5), FedAvg())
    reply, _, _ = parse_reply(site.answer(question(site, FedAvg(), 1)))
    assert reply.summed_facts["weight"] == 5.0
    assert of_group("update", reply.summed)
    assert not reply.seen


def private(site: Any, member: Any, settings: Any, *, rounds: int, randomness: str = "seeded") -> Any:
    """The site with a guarantee for the member's records over so many rounds."""
    privacy = Privacy(record=RecordPrivacy(noise_multiplier=1.0, delta=1e-2), randomness=randomness)
    arm = Arm("arm", Adapter(), settings, StrategyChoice(name="fedavg", rounds=rounds), privacy)
    noisy, ledger = at_member(member, arm)
    plain = site.open_arm

    @contextlib.contextmanager
    def open_arm(name: str) -> Iterator[Any]:
        with plain(name) as at:
            yield replace(at, member=noisy, ledger=ledger)

    site.open_arm = open_arm
    return site


@pytest.mark.parametrize("randomness", ["seeded", "secure"])
def test_nobody_can_ask_for_more_than_the_records_guarantee_covers(
    randomness: str, make_site: Callable[..., Any], make_member: Callable[..., Any], settings: Any
) -> None:
    """Other parameters in the same round would have the same noise, or new noise, on another gradient."""
    member = make_member("a")
    site = private(make_site(member, FedAvg()), member, settings, rounds=2, randomness=randomness)
    asked = question(site, FedAvg(), 1)
    assert "error" not in parse(site.answer(asked))[1]
    assert "error" not in parse(site.answer(asked))[1]  # the same answer again costs nothing
    assert "error" not in parse(site.answer(question(site, FedAvg(), 1, shift=0.1)))[1]
    again = private(make_site(member, FedAvg(), site.folder), member, settings, rounds=2, randomness=randomness)
    for one in (question(site, FedAvg(), 1, shift=0.2), question(site, FedAvg(), 2)):
        for where in (site, again):  # also after a restart
            _, about = parse(where.answer(one))
            assert "does not cover another round: 2 of 2" in about["error"]["what"]


def test_what_was_begun_and_broken_off_costs_where_noise_is_drawn_anew(
    make_site: Callable[..., Any], make_member: Callable[..., Any], settings: Any
) -> None:
    member = make_member("a")
    for randomness, covered in (("seeded", True), ("secure", False)):
        site = private(
            make_site(member, FedAvg(), make_site(member, FedAvg()).folder / randomness),
            member,
            settings,
            rounds=1,
            randomness=randomness,
        )
        asked = question(site, FedAvg(), 1)

        def broken(*step: Any) -> None:
            raise KeyboardInterrupt

        site.on_step = broken
        with pytest.raises(KeyboardInterrupt):
            site.answer(asked)
        site.on_step = lambda *step: None
        assert ("error" not in parse(site.answer(asked))[1]) == covered
