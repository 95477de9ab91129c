"""Sums out of sight in a simulation: near the plain ones, and nothing of a member in a reply."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from allmend.errors import UserError
from allmend.events import RoundDone
from allmend.federation.engines.hiding import HidingEngine
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.privacy.vectors import codes_of_legs, rounding
from allmend.federation.strategies import STRATEGIES, build_strategy
from allmend.federation.strategies.fedavg import FedAvg
from allmend.recipe import SecureAggregation, Train

OPTIONS = {"grouped": {"groups": "a, b c"}}
DECLARED = {name: build_strategy(name, OPTIONS.get(name, {}), seed=0).declare() for name in STRATEGIES}
SUMMING = sorted({name for name, told in DECLARED.items() if not set(told.seen) - told.beside} - {"comigs"})
"""But for the one that trains a mixture, which has a test of its own of the same."""


def hidden(
    strategy: Any, members: Any, trainable: Any, settings: Train, *, fewest: int = 3, **layer: Any
) -> HidingEngine:
    inner = InProcessEngine(trainable, members, settings, lambda name, turn, step: None)
    codes = codes_of_legs(strategy, trainable.state(), SecureAggregation(**layer), len(members))
    return HidingEngine(inner, codes, lambda turn, member: rounding("seeded", 1, "arm", turn, member), fewest)


@pytest.mark.parametrize("name", SUMMING)
def test_a_hidden_sum_is_the_plain_one_to_the_width_of_a_step(
    name: str,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_trainable: Callable[..., Any],
    settings: Train,
) -> None:
    strategy = build_strategy(name, OPTIONS.get(name, {}), seed=0)
    members = [make_member(member, records=3) for member in "abc"]
    plain = run(strategy, members, settings, rounds=1)
    trainable = make_trainable()
    engine = hidden(strategy, members, trainable, settings)
    found = run(strategy, members, settings, rounds=1, engine=engine, trainable=trainable)
    for key, tensor in plain.state.tensors.items():
        torch.testing.assert_close(found.state.tensors[key], tensor, rtol=1e-3, atol=1e-4)
    events = [next(event for event in one.events if isinstance(event, RoundDone)) for one in (plain, found)]
    assert events[0].loss == pytest.approx(events[1].loss, abs=1e-3) if events[0].loss else events[1].loss is None
    assert events[1].cut == 0
    shown = 2 * 256 * 4 if name == "clustered" else 0
    size = sum(code.length * 8 for code in engine.codes) + shown
    assert events[1].received == dict.fromkeys("abc", size)


def test_replies_come_without_what_is_summed(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    strategy, trainable = FedAvg(), make_trainable()
    members = [make_member(member) for member in "abc"]
    engine = hidden(strategy, members, trainable, settings)
    tasks = strategy.plan(strategy.init(trainable.state()), _turn(), engine.members)
    for answer in engine.work(strategy, tasks):
        assert answer.reply.summed == {}
        assert answer.reply.summed_facts == {}
    sums, names = engine.summed()
    assert names == [member.name for member in members]
    assert sums is not None
    assert sums.members == 3
    assert sums.fact("weight") == 12.0


@pytest.mark.parametrize("name", SUMMING)
def test_an_observer_sees_what_is_sent_and_nothing_of_a_member(
    name: str,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_trainable: Callable[..., Any],
    settings: Train,
) -> None:
    strategy, trainable = build_strategy(name, OPTIONS.get(name, {}), seed=0), make_trainable()
    members, seen = [make_member(member) for member in "abc"], set[str | None]()
    engine = hidden(strategy, members, trainable, settings)
    run(
        strategy, members, settings, rounds=2, engine=engine, trainable=trainable,
        observe=lambda round, whose, model: seen.add(whose),
    )  # fmt: skip
    assert seen == ({None} if strategy.shares else set())


def _turn() -> Any:
    from allmend.strategy import Turn

    return Turn(1, 0, 1, 3)


def test_changes_beyond_the_clip_are_cut_and_counted(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    members, trainable = [make_member(member) for member in "abc"], make_trainable()
    engine = hidden(FedAvg(), members, trainable, settings, clip=0.001, largest_weight=4.0)
    found = run(FedAvg(), members, settings, rounds=1, engine=engine, trainable=trainable)
    (event,) = [event for event in found.events if isinstance(event, RoundDone)]
    assert 0 < event.cut <= 3 * trainable.count
    start = make_trainable().state()
    for name, tensor in start.items():
        moved = found.state.tensors[f"model/{name}"] - tensor
        assert moved.abs().max() <= 0.001 + 1e-6


def test_a_sum_over_too_few_is_not_opened(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    members, trainable = [make_member(member) for member in "abcd"], make_trainable()
    engine = hidden(FedAvg(participation=0.5), members, trainable, settings)
    with pytest.raises(UserError, match="a sum over 2 members is not opened, and 3 are the fewest"):
        run(FedAvg(participation=0.5), members, settings, rounds=1, engine=engine, trainable=trainable)
