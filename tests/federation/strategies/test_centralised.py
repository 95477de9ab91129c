"""Centralised training: one party, whose optimiser goes on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from allmend.federation.strategies.centralised import Centralised
from allmend.federation.strategies.local import Local
from allmend.recipe import Train
from allmend.strategy import State, Turn, of_group


def test_it_is_local_training_of_the_party_that_holds_all(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    member = make_member("all", records=5)
    shared = Centralised().shared(run(Centralised(), [member], settings, rounds=3).state)
    own = Local().personal(State(), run(Local(), [member], settings, rounds=3).states["all"])
    assert shared is not None
    assert own is not None
    assert all(torch.equal(shared[name], own[name]) for name in own)


def test_it_needs_one_party() -> None:
    strategy = Centralised()
    assert strategy.pooled
    with pytest.raises(ValueError, match="not 2"):
        strategy.plan(strategy.init({"x": torch.zeros(1)}), Turn(1, 0, 1), ["a", "b"])


def test_the_model_is_what_came_back(make_toy: Callable[..., Any]) -> None:
    strategy, client = Centralised(), make_toy("a")
    state = strategy.init({"x": torch.ones(3)})
    task = strategy.plan(state, Turn(1, 0, 1), ["a"])["a"]
    reply = strategy.work(task, client)
    assert of_group("model", reply.seen).keys() == {"x"}
    torch.testing.assert_close(reply.seen["model/x"], 1 + client.step)
    assert reply.summed == {}
    assert reply.seen_facts == {"loss": float(client.step.sum())}


def test_what_the_client_keeps_for_itself_stays(make_toy: Callable[..., Any]) -> None:
    strategy, client = Centralised(), make_toy("a")
    client.state.tensors = {"client/learnt": torch.ones(2, 2)}
    strategy.work(strategy.plan(strategy.init({"x": torch.ones(3)}), Turn(1, 0, 1), ["a"])["a"], client)
    assert client.state.tensors.keys() == {"client/learnt", "optimizer/steps"}


def test_a_loss_that_must_not_leave_does_not(make_quiet_toy: Callable[..., Any]) -> None:
    strategy = Centralised()
    task = strategy.plan(strategy.init({"x": torch.ones(3)}), Turn(1, 0, 1), ["a"])["a"]
    reply = strategy.work(task, make_quiet_toy("a"))
    assert reply.seen_facts == {}
    assert reply.seen.keys() == {"model/x"}
