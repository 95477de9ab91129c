"""A member's side: what a round of its training consists of."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.federation.member import LEARNT, OPTIMIZER, Member, MemberClient, change
from allmend.learn.loop import DivergedError, Step
from allmend.learn.private import RecordNoise
from allmend.models.adapters import add_lora
from allmend.recipe import Train
from allmend.strategy import State, Turn


def test_a_round_starts_from_what_it_is_given(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    trainable = make_trainable()
    initial = trainable.state()
    told: list[tuple[str, Turn, Step]] = []
    client = MemberClient(make_member("a"), trainable, settings, initial, on_step=lambda *step: told.append(step))
    first = client.train(initial, Turn(1, 0, 2))
    trainable.load({name: torch.randn_like(tensor) for name, tensor in initial.items()})  # another member was here
    client.state = State()
    again = client.train(initial, Turn(1, 0, 2))
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in initial)
    assert first.loss == again.loss
    assert [step.number for _, _, step in told] == [1, 2, 1, 2]
    assert {(name, turn) for name, turn, _ in told} == {("a", Turn(1, 0, 2))}
    assert (first.steps, client.examples, first.tokens) == (2, 4, sum(step.tokens for _, _, step in told[:2]))


def test_steps_count_on_over_rounds_and_the_data_goes_on_too(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    member, told = make_member("a", records=3), []
    trainable = make_trainable()
    settings = settings.model_copy(update={"batch_size": 1, "local_steps": 2, "learning_rate": 1e-12})
    client = MemberClient(
        member, trainable, settings, trainable.state(), on_step=lambda name, turn, step: told.append(step)
    )
    for number in (1, 2, 3):
        client.train(client.initial, Turn(number, 0, 3))
    assert [step.number for step in told] == [1, 2, 3, 4, 5, 6]
    assert client.state.facts["steps"] == 6
    # six steps of one record are two passes over three records: each pass has the same losses, in some order
    losses = [round(step.loss, 4) for step in told]
    assert sorted(losses[:3]) == sorted(losses[3:])
    assert len(set(losses)) == 3


def test_who_sat_out_is_as_far_down_the_schedule_as_the_rest(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    rates: dict[str, list[float]] = {"always": [], "late": []}
    trainable = make_trainable()
    cosine = settings.model_copy(update={"schedule": "cosine"})
    clients = {
        name: MemberClient(
            make_member(name),
            trainable,
            cosine,
            trainable.state(),
            on_step=lambda name, turn, step: rates[name].append(step.learning_rate),
        )
        for name in rates
    }
    for round in (1, 2, 3):
        clients["always"].train(clients["always"].initial, Turn(round, 0, 3))
    clients["late"].train(clients["late"].initial, Turn(3, 0, 3))
    assert rates["late"] == rates["always"][-2:]
    assert rates["always"] == sorted(rates["always"], reverse=True)
    assert 0 < rates["always"][-1] < rates["always"][0]


@pytest.mark.parametrize("fault", ["diverged", "nothing to learn"])
def test_a_failure_names_the_member_and_the_round(
    fault: str, make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    trainable, member = make_trainable(), make_member("north")
    start = trainable.state()
    if fault == "diverged":
        start = {name: torch.full_like(tensor, torch.nan) for name, tensor in start.items()}
    else:
        blind = [Encoded(r.id, r.ids, torch.zeros_like(r.target), r.branch, r.position) for r in member.records]
        member = Member("north", blind, 0)
    client = MemberClient(member, trainable, settings, start)
    with pytest.raises(UserError, match="client 'north', round 4") as raised:
        client.train(start, Turn(4, 0, 9))
    assert isinstance(raised.value, DivergedError) == (fault == "diverged")
    assert raised.value.hint
    assert client.state == State()


def test_what_was_learnt_from_is_counted_over_rounds(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    member, trainable = make_member("a", records=5), make_trainable()
    blind = replace(member.records[0], target=torch.zeros_like(member.records[0].target))
    member = replace(member, records=[blind, *member.records[1:]])
    kept = {"model/x": torch.ones(1)}
    settings = settings.model_copy(update={"local_steps": 2})
    client = MemberClient(member, trainable, settings, trainable.state(), State(kept))
    for round in (1, 2, 3):
        client.train(client.initial, Turn(round, 0, 3))
        # two steps of two records see the four of them that have targets, once each
        targets = [int(record.target[1:].sum()) for record in member.records[1:]]
        assert client.state.tensors[LEARNT].dtype == torch.int64
        assert client.state.tensors[LEARNT].tolist() == [[0, 0], *([round, round * count] for count in targets)]
    assert client.state.tensors["model/x"] is kept["model/x"]
    assert LEARNT not in kept


def test_records_with_a_guarantee_keep_their_loss_to_the_member(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    trainable, told = make_trainable(), []
    plain = MemberClient(make_member("a"), trainable, settings, trainable.state())
    expected = plain.train(plain.initial, Turn(1, 0, 1))
    assert expected.loss is not None
    noise = RecordNoise(1.0, 1.0, "shuffle", "seeded")
    private = MemberClient(
        replace(make_member("a"), noise=noise),
        trainable,
        settings,
        plain.initial,
        on_step=lambda name, turn, step: told.append(step),
    )
    found = private.train(plain.initial, Turn(1, 0, 1))
    assert found.loss is None
    assert all(step.loss is not None for step in told)
    assert (found.steps, found.tokens) == (expected.steps, expected.tokens)
    assert any(not torch.equal(found.tensors[name], expected.tensors[name]) for name in found.tensors)


@pytest.mark.parametrize("share", [0.1, 0.999, 1.0, 2.0])
def test_a_change_is_scaled_down_to_its_bound_and_else_left_alone(
    share: float, make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    trainable = make_trainable()
    initial = trainable.state()

    def trained(bound: float | None) -> Any:
        bounded = settings.model_copy(update={"largest_update": bound})
        return MemberClient(make_member("a"), trainable, bounded, initial).train(initial, Turn(1, 0, 2)).tensors

    free = trained(None)
    norm = torch.cat([(free[name].double() - initial[name].double()).flatten() for name in free]).norm().item()
    found = trained(share * norm)
    for name, tensor in free.items():
        expected = initial[name] + min(1.0, share) * (tensor - initial[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
    assert change(found, initial) <= share * norm * (1 + 1e-6)
    if share >= 1:
        assert all(torch.equal(found[name], free[name]) for name in free)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_member_of_lower_rank_trains_as_with_an_adapter_of_that_rank(
    rank: int, make_member: Callable[..., Any], make_tiny_model: Callable[..., Any], settings: Train
) -> None:
    """Its components end where those of a smaller adapter with the same scale end, and the others stay as they were."""
    settings = settings.model_copy(update={"local_steps": 4, "weight_decay": 0.1})
    whole = add_lora(make_tiny_model(), rank=4, alpha=8.0, targets=["q_proj", "v_proj"], seed=1)
    start = {
        name: torch.randn(t.shape, generator=torch.Generator().manual_seed(len(name))) / 8
        for name, t in whole.state().items()
    }
    limited = replace(make_member("a"), rank=rank)
    found = MemberClient(limited, whole, settings, start).train(start, Turn(1, 0, 1)).tensors

    small = add_lora(make_tiny_model(), rank=rank, alpha=8.0 * rank / 4, targets=["q_proj", "v_proj"], seed=1)
    cut = {name: t[:rank] if "lora_A" in name else t[:, :rank] for name, t in start.items()}
    alone = MemberClient(make_member("a"), small, settings, cut).train(cut, Turn(1, 0, 1)).tensors
    for name, tensor in found.items():
        first, rest = (tensor[:rank], tensor[rank:]) if "lora_A" in name else (tensor[:, :rank], tensor[:, rank:])
        torch.testing.assert_close(first, alone[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(rest, start[name][rank:] if "lora_A" in name else start[name][:, rank:])
        assert not torch.equal(first, cut[name])


def test_a_rank_above_the_adapters_changes_nothing(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    trainable = make_trainable()
    initial = trainable.state()
    free, limited = (
        MemberClient(replace(make_member("a"), rank=rank), trainable, settings, initial).train(initial, Turn(1, 0, 1))
        for rank in (None, 99)
    )
    assert all(torch.equal(free.tensors[name], limited.tensors[name]) for name in initial)


@pytest.mark.parametrize("name", ["adamw", "liona"])
def test_an_optimiser_that_persists_goes_on_in_the_next_round(
    name: str, make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    """Two rounds of two steps, each from where the last ended, are one of four."""
    few = settings.model_copy(update={"optimizer": name, "optimizer_state": "persist", "local_steps": 2})
    trainable = make_trainable()
    client = MemberClient(make_member("a"), trainable, few, trainable.state())
    middle = client.train(client.initial, Turn(1, 0, 2))
    parts = client.train(middle.tensors, Turn(2, 0, 2))
    assert any(key.startswith(f"{OPTIMIZER}/exp_avg/") for key in client.state.tensors)
    whole_settings = few.model_copy(update={"local_steps": 4})
    other = MemberClient(make_member("a"), make_trainable(), whole_settings, client.initial)
    whole = other.train(client.initial, Turn(1, 0, 1))
    assert all(torch.equal(whole.tensors[key], parts.tensors[key]) for key in whole.tensors)
    anew = MemberClient(
        make_member("a"), make_trainable(), few.model_copy(update={"optimizer_state": "reset"}), client.initial
    )
    anew.train(client.initial, Turn(1, 0, 2))
    assert not any(key.startswith(OPTIMIZER) for key in anew.state.tensors)
    again = anew.train(middle.tensors, Turn(2, 0, 2))
    assert not all(torch.equal(again.tensors[key], parts.tensors[key]) for key in parts.tensors)
