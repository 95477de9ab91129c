"""Local training: no exchange, so every member is what it would be alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from allmend.events import RoundDone
from allmend.federation.member import LEARNT, MemberClient
from allmend.federation.strategies.local import Local
from allmend.recipe import Train
from allmend.strategy import State, Turn


def test_each_member_is_itself_alone(run: Callable[..., Any], make_member: Callable[..., Any], settings: Train) -> None:
    members = [make_member("a", records=3), make_member("b", records=5)]
    together = run(Local(), members, settings, rounds=3)
    for member in members:
        alone = run(Local(), [member], settings, rounds=3)
        first, second = together.states[member.name].tensors, alone.states[member.name].tensors
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    personal = {name: Local().personal(State(), state) for name, state in together.states.items()}
    assert any((personal["a"][name] - personal["b"][name]).abs().max() > 1e-3 for name in personal["a"])  # type: ignore[index]
    assert Local().shared(together.state) is None


def test_the_optimizer_goes_on_from_round_to_round(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    """Three rounds are one training of as many steps, cut into three."""
    member = make_member("a")
    rounds = run(Local(), [member], settings, rounds=3).states["a"]
    once = MemberClient(member, trainable := make_trainable(), settings.model_copy(update={"local_steps": 6}), {})
    found = once.train(trainable.state(), Turn(1, 0, 1))
    own = Local().personal(State(), rounds)
    assert own is not None
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-7)


def test_no_tensor_leaves_a_member(run: Callable[..., Any], make_member: Callable[..., Any], settings: Train) -> None:
    outcome = run(Local(), [make_member("a"), make_member("b")], settings, rounds=1)
    (done,) = (event for event in outcome.events if isinstance(event, RoundDone))
    assert set(done.sent.values()) == set(done.received.values()) == {0}
    assert outcome.state.tensors == {}


def test_the_loss_is_weighted_by_records(make_toy: Callable[..., Any]) -> None:
    client = make_toy("a", 4)
    task = Local().plan(State(), Turn(1, 0, 1), ["a"])["a"]
    reply = Local().work(task, client)
    assert reply.summed_facts == {"weight": 4.0, "loss": 4.0 * float(client.step.sum())}
    assert reply.summed == reply.seen == {}
    Local().work(task, client)
    assert client.optimizers[0] is None
    assert client.optimizers[1] is not None
    assert client.optimizers[1]["steps"] == 1
    torch.testing.assert_close(client.state.tensors["model/x"], 2 * client.step)


def test_what_the_client_keeps_for_itself_stays(make_toy: Callable[..., Any]) -> None:
    client = make_toy("a")
    client.state.tensors = {"client/learnt": torch.ones(2, 2), "model/x": torch.ones(3)}
    Local().work(Local().plan(State(), Turn(1, 0, 1), ["a"])["a"], client)
    assert client.state.tensors.keys() == {"client/learnt", "model/x", "optimizer/steps"}
    torch.testing.assert_close(client.state.tensors["model/x"], 1 + client.step)


def test_a_loss_that_must_not_leave_does_not(make_quiet_toy: Callable[..., Any]) -> None:
    reply = Local().work(Local().plan(State(), Turn(1, 0, 1), ["a"])["a"], make_quiet_toy("a", 4))
    assert reply.summed_facts == {"weight": 4.0}


def test_with_validation_it_leaves_out_what_comigs_sets_apart(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    """As many steps, on the other records; what stands in those that are left out changes nothing."""
    member = make_member("a", records=8)
    found = run(Local(validation=0.25), [member], settings, rounds=3).states["a"]
    apart = MemberClient(member, make_trainable(), settings, {})._apart(0.25)
    learnt = found.tensors[LEARNT][:, 0]
    assert len(apart) == 2
    assert not learnt[apart].any()
    assert (learnt > 0).sum() == 6
    assert found.facts["steps"] == run(Local(), [member], settings, rounds=3).states["a"].facts["steps"]
    other = list(member.records)
    for place in apart:
        other[place] = replace(other[place], ids=other[place].ids.flip(0))
    changed = run(Local(validation=0.25), [replace(member, records=other)], settings, rounds=3).states["a"]
    assert all(torch.equal(tensor, changed.tensors[name]) for name, tensor in found.tensors.items())
    # where routers have a target, comigs' experts learn from all records, and so does their baseline
    target = replace(member, target=member.records)
    whole = run(Local(validation=0.25), [target], settings, rounds=3).states["a"]
    assert (whole.tensors[LEARNT][:, 0] > 0).all()


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="validation must lie in"):
        Local(validation=share)
