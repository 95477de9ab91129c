"""The engine in this process: many members on one base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from allmend.federation.checkpoint import Checkpoints
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.member import LEARNT
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
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


def test_what_was_learnt_from_outlives_a_checkpoint(
    make_member: Callable[..., Any], run: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    members = [make_member("a"), make_member("b", records=3)]
    for strategy in (FedAvg(), Local()):
        whole = run(strategy, members, settings, rounds=3)
        run(strategy, members, settings, rounds=2, folder=tmp_path / strategy.name)
        start = Checkpoints(tmp_path / strategy.name, "identity").newest()
        resumed = run(strategy, members, settings, rounds=3, start=start)
        for member in members:
            learnt = resumed.states[member.name].tensors[LEARNT]
            assert torch.equal(learnt, whole.states[member.name].tensors[LEARNT])
            # one pass over the records each round
            assert learnt.tolist() == [[3, 3 * int(record.target[1:].sum())] for record in member.records]


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
