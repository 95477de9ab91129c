"""The engine in this process: many members on one base."""

from collections.abc import Callable
from typing import Any

import torch

from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.strategies.fedavg import FedAvg
from allmend.recipe import Train
from allmend.strategy import State, Turn


def test_answers_come_in_the_order_of_names_and_only_from_those_asked(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    trainable = make_trainable()
    heard: list[str] = []
    members = [make_member(name) for name in ("c", "a", "b")]
    engine = InProcessEngine(trainable, members, settings, lambda name, turn, step: heard.append(name))
    assert engine.members == ["a", "b", "c"]
    strategy = FedAvg()
    tasks = strategy.plan(strategy.init(trainable.state()), Turn(1, 0, 1), ["c", "a"])
    answers = list(engine.work(strategy, tasks))
    assert [answer.member for answer in answers] == ["a", "c"]
    assert heard == ["a", "a", "c", "c"]
    assert engine.states()["b"] == State()


def test_members_share_one_base_and_leave_it_as_it_was(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], run: Callable[..., Any], settings: Train
) -> None:
    trainable = make_trainable()
    frozen = {n: p.detach().clone() for n, p in trainable.model.named_parameters() if not p.requires_grad}
    assert frozen
    run(FedAvg(), [make_member("a"), make_member("b")], settings, rounds=2, trainable=trainable)
    after = dict(trainable.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_states_are_put_back_and_who_is_not_named_starts_afresh(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    engine = InProcessEngine(
        make_trainable(), [make_member("a"), make_member("b")], settings, lambda name, turn, step: None
    )
    kept = State({"x": torch.ones(2)}, {"steps": 4})
    engine.restore({"a": kept})
    assert engine.states() == {"a": kept, "b": State()}
    engine.restore({})
    assert engine.states() == {"a": State(), "b": State()}
    engine.close()
