"""A member's site: what it keeps, what it answers, and what no question can make it do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.federation.engines.wire import dump_task, parse_reply
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.models.tensors import parse
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


@pytest.mark.parametrize("arm", ["../../outside", "/etc", "", ".", "a/b", "x" * 65, "nul\0"])
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
