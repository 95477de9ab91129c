"""FedAvg and then local training, against each of the two."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from allmend.events import RoundDone
from allmend.federation.member import MemberClient
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.finetuned import FineTuned
from allmend.recipe import Train
from allmend.strategy import Seen, State, Sums, Turn, of_group


@pytest.mark.parametrize(
    ("rounds", "share", "first"),
    [(16, 0.375, 11), (8, 0.375, 6), (10, 0.9, 2), (3, 0.01, 3), (2, 0.99, 2), (1, 0.5, 1)],
)
def test_the_last_rounds_are_local_one_at_least_and_not_all(rounds: int, share: float, first: int) -> None:
    assert FineTuned(local_rounds=share).first_local(rounds) == first


def test_it_is_fedavg_and_then_the_members_own_training(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a"), make_member("b", records=7)]
    strategy = FineTuned(local_rounds=0.5)
    found = run(strategy, members, settings, rounds=4)
    shared = of_group("model", run(FedAvg(), members, settings, rounds=2).state.tensors)
    assert all(torch.equal(found.state.tensors[f"model/{name}"], tensor) for name, tensor in shared.items())
    assert strategy.shared(found.state) is None
    for member in members:
        trainable = make_trainable()
        steps = len(member.records) // 2 + len(member.records) % 2
        client = MemberClient(member, trainable, settings, trainable.state(), State(facts={"steps": 2 * steps}))
        third = client.train(shared, Turn(3, 0, 4))
        fourth = client.train(third.tensors, Turn(4, 0, 4), optimizer=third.optimizer)
        own = strategy.personal(State(), found.states[member.name])
        assert own is not None
        assert all(torch.equal(own[name], tensor) for name, tensor in fourth.tensors.items())


def test_nothing_leaves_in_local_rounds_and_the_model_comes_once(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    found = run(FineTuned(local_rounds=0.6), [make_member("a"), make_member("b")], settings, rounds=5)
    plain = run(FedAvg(), [make_member("a"), make_member("b")], settings, rounds=1)
    (first,) = (event for event in plain.events if isinstance(event, RoundDone))
    done = [event for event in found.events if isinstance(event, RoundDone)]
    nothing = dict.fromkeys("ab", 0)
    assert [event.received for event in done] == [first.received] * 2 + [nothing] * 3
    assert [event.sent for event in done] == [first.sent] * 3 + [nothing] * 2


def test_who_missed_the_first_local_round_gets_the_model_later(make_toy: Callable[..., Any]) -> None:
    strategy, state = FineTuned(local_rounds=0.7), State({"model/x": torch.ones(3)})
    a, b = make_toy("a"), make_toy("b")
    tasks = strategy.plan(state, Turn(2, 0, 4), ["a", "b"])
    strategy.work(tasks["a"], a)
    state = strategy.combine(state, Turn(2, 0, 4), Sums(), {"a": Seen({}, {})})
    tasks = strategy.plan(state, Turn(3, 0, 4), ["a", "b"])
    assert (tasks["a"].tensors, list(tasks["b"].tensors)) == ({}, ["x"])
    strategy.work(tasks["b"], b)
    torch.testing.assert_close(strategy.personal(State(), b.state), {"x": 1 + b.step})
    # who never came has the common model
    assert strategy.personal(state, State()) == {"x": state.tensors["model/x"]}


def test_what_is_revealed_is_fedavgs_and_nothing_of_a_local_round(make_toy: Callable[..., Any]) -> None:
    strategy, client = FineTuned(local_rounds=0.5), make_toy("a")
    state = strategy.init({"x": torch.ones(3)})
    for round in (1, 2):
        task = strategy.plan(state, Turn(round, 0, 2), ["a"])["a"]
        reply = strategy.work(task, client)
        seen = strategy.revealed(task, reply)
        if round == 1:
            torch.testing.assert_close(seen, {"x": 1 + client.step})
        else:
            assert seen is None
            assert (reply.summed, reply.summed_facts, reply.seen, reply.seen_facts) == ({}, {}, {}, {})


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="local_rounds must lie between 0 and 1"):
        FineTuned(local_rounds=share)
