"""Rounds: what is sent and summed, what stops them, and that they go on where they stopped."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.errors import UserError
from allmend.events import Event, RoundDone, Warned
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines import Answer
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.privacy.accounting import Release
from allmend.federation.privacy.ledger import Account, Ledger
from allmend.federation.rounds import run_rounds
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.federation.strategies.private_fedavg import PrivateFedAvg
from allmend.federation.strategies.robust import Median
from allmend.models.tensors import Tensors, nbytes
from allmend.recipe import MemberPrivacy, Train
from allmend.strategy import Declaration, Reply, State, Strategy, Task, of_group


def equal(first: State, second: State) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors
    )


@pytest.mark.parametrize("strategy", [FedAvg(participation=0.5, seed=3), Local()])
def test_rounds_from_any_checkpoint_end_at_the_same_bits(
    strategy: Strategy,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    settings: Train,
    tmp_path: Path,
) -> None:
    members = [make_member(name) for name in ("a", "b", "c")]
    whole = run(strategy, members, settings, rounds=4)
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        run(strategy, members, settings, rounds=stop, folder=folder)
        start = Checkpoints(folder, "identity").newest()
        assert start is not None
        assert start.round == stop
        resumed = run(strategy, members, settings, rounds=4, start=start)
        assert equal(resumed.state, whole.state)
        assert all(equal(resumed.states[name], whole.states[name]) for name in whole.states)
        assert resumed.took_part == whole.took_part
        assert [e.round for e in resumed.events if isinstance(e, RoundDone)] == list(range(stop + 1, 5))


def test_a_finished_run_trains_nothing(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    done = run(FedAvg(), [make_member("a")], settings, rounds=2, folder=tmp_path)
    again = run(FedAvg(), [make_member("a")], settings, rounds=2, start=Checkpoints(tmp_path, "identity").newest())
    assert again.events == []
    assert equal(again.state, done.state)


def test_what_travels_is_counted(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    outcome = run(FedAvg(participation=0.5), [make_member(n) for n in ("a", "b", "c", "d")], settings, rounds=2)
    size = nbytes(make_trainable().state())
    for event in outcome.events:
        assert isinstance(event, RoundDone)
        assert len(event.clients) == 2
        assert event.sent == event.received == dict.fromkeys(event.clients, size)
        assert 0 < event.training_seconds <= event.seconds


def test_who_took_part_is_counted_and_kept(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    members = [make_member(name) for name in ("a", "b", "c")]
    outcome = run(FedAvg(participation=0.4), members, settings, rounds=2, folder=tmp_path)
    told = Counter(name for event in outcome.events for name in event.clients)
    assert outcome.took_part == told
    assert sum(told.values()) == 2  # one in each round, so not all three equally often
    newest = Checkpoints(tmp_path, "identity").newest()
    assert newest is not None
    assert newest.took_part == told


# --- what can be seen of a round


def test_an_observer_sees_each_members_model_and_the_new_shared_one(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    """What the replies reveal are the models whose weighted mean is sent to all."""
    members = [make_member("a", records=2), make_member("b", records=5)]
    seen: dict[tuple[int, str | None], Tensors] = {}
    outcome = run(
        FedAvg(), members, settings, rounds=2, observe=lambda round, name, model: seen.update({(round, name): model})
    )
    assert list(seen) == [(round, name) for round in (1, 2) for name in ("a", "b", None)]
    for round in (1, 2):
        for name, shared in seen[round, None].items():
            mean = (2 * seen[round, "a"][name].double() + 5 * seen[round, "b"][name].double()) / 7
            torch.testing.assert_close(shared.double(), mean, rtol=1e-5, atol=1e-7)
    last = of_group("model", outcome.state.tensors)
    assert all(torch.equal(tensor, last[name]) for name, tensor in seen[2, None].items())
    none: list[object] = []
    run(Local(), members, settings, rounds=1, observe=lambda *what: none.append(what))
    assert none == []  # no parameter leaves a member


# --- the ledger


def account(name: str, *, releases: int = 1, epsilon: float | None = None) -> Account:
    layer = MemberPrivacy(noise_multiplier=1.0, epsilon=epsilon, delta=1e-2)
    return Account("member", layer, Release(1.0), lambda rounds: releases * rounds, name, 9)


def test_each_clients_account_counts_the_rounds_that_it_took_part_in(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    names = ("a", "b", "c")
    ledger = Ledger({name: account(name, releases=2) for name in names} | {"members": account("members")})
    outcome = run(FedAvg(participation=0.4), [make_member(n) for n in names], settings, rounds=5, ledger=ledger)
    took_part: Counter[str] = Counter()
    for event in outcome.events:
        took_part.update(event.clients)
        price = {name: ledger.accounts[name].epsilon(took_part[name]) for name in names}
        assert event.epsilon == price | {"members": ledger.accounts["members"].epsilon(event.round)}
        assert event.loss is None
    assert sum(took_part.values()) == 5  # one in each round, so not all three equally often


@pytest.mark.parametrize("whose", ["a", "members"])
def test_a_budget_ends_the_rounds_before_it_is_exceeded(
    whose: str, run: Callable[..., Any], make_member: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    """The client's account ends them before its own third round, the members' before the third of all."""
    members = [make_member(name) for name in ("a", "b", "c")]
    strategy = FedAvg(participation=0.4, seed=1)
    free = run(strategy, members, settings, rounds=9)
    mine = [event.round for event in free.events if whose == "members" or whose in event.clients]
    ledger = Ledger({whose: account(whose, epsilon=account(whose).epsilon(2) + 1e-9)})
    outcome = run(strategy, members, settings, rounds=9, ledger=ledger, folder=tmp_path)
    *rounds, warned = outcome.events
    assert [event.round for event in rounds] == list(range(1, mine[2]))
    assert isinstance(warned, Warned)
    assert f"after round {mine[2] - 1} of 9" in warned.message
    assert whose in warned.message
    kept = Checkpoints(tmp_path, "identity").newest()
    assert kept is not None
    assert (kept.round, kept.took_part) == (mine[2] - 1, outcome.took_part)
    again = run(strategy, members, settings, rounds=9, ledger=ledger, start=kept)
    assert again.events == [warned]
    assert equal(again.state, outcome.state)


def test_a_round_in_which_nobody_is_drawn_is_a_round(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train, make_trainable: Callable[..., Any]
) -> None:
    strategy = PrivateFedAvg(clip=1.0, noise_multiplier=1.0, participation=1e-9)
    ledger = Ledger({"members": account("members")})
    outcome = run(strategy, [make_member("a")], settings, rounds=2, ledger=ledger)
    assert [(event.clients, event.sent, event.received) for event in outcome.events] == [([], {}, {})] * 2
    assert [event.epsilon["members"] for event in outcome.events] == [account("").epsilon(1), account("").epsilon(2)]
    initial = make_trainable().state()
    assert all(not torch.equal(t, initial[n]) for n, t in of_group("model", outcome.state.tensors).items())  # noise


@dataclass(frozen=True)
class Leaky(FedAvg):
    """Returns what it did not declare."""

    def work(self, task: Task, client: Any) -> Reply:
        reply = super().work(task, client)
        return Reply(reply.summed, reply.summed_facts, {"diary/x": torch.zeros(1)}, {"mood": 1.0})


@dataclass(frozen=True)
class Honest(Leaky):
    def declare(self) -> Declaration:
        declaration = super().declare()
        return Declaration(declaration.sent, declaration.summed, {"diary": "why not", "mood": "curiosity"})


def test_an_undeclared_reply_is_caught_before_anything_is_kept(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=r"did not declare: \['diary', 'mood'\]"):
        run(Leaky(), [make_member("a")], settings, rounds=1, folder=tmp_path)
    assert Checkpoints(tmp_path, "identity").newest() is None
    run(Honest(), [make_member("a")], settings, rounds=1)


@dataclass
class Spoils(InProcessEngine):
    """Puts one bad value into one member's reply in one round."""

    bad: torch.Tensor | None = None

    def work(self, strategy: Strategy, tasks: Any) -> Any:
        for answer in super().work(strategy, tasks):
            if answer.member == "b" and next(iter(tasks.values())).turn.round == 2:
                group = "summed" if answer.reply.summed else "seen"
                tensors = getattr(answer.reply, group)
                spoilt = tensors | {min(tensors): self.bad}
                answer = Answer(answer.member, replace(answer.reply, **{group: spoilt}))
            yield answer


@pytest.mark.parametrize("bad", [torch.tensor(torch.nan), torch.tensor([1.0, torch.inf]), torch.zeros(1, 1)])
@pytest.mark.parametrize("strategy", [FedAvg(), Median()])
def test_a_reply_that_cannot_be_used_names_the_member_and_keeps_the_round_before(
    strategy: Strategy,
    bad: torch.Tensor,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_trainable: Callable[..., Any],
    settings: Train,
    tmp_path: Path,
) -> None:
    members, trainable = [make_member("a"), make_member("b")], make_trainable()
    engine = Spoils(trainable, members, settings, lambda name, turn, step: None, bad=bad)
    with pytest.raises(UserError, match=r"client 'b', round 2: .*lora_A"):
        run(strategy, members, settings, rounds=3, engine=engine, trainable=trainable, folder=tmp_path)
    kept = Checkpoints(tmp_path, "identity").newest()
    assert kept is not None
    assert kept.round == 1
    resumed = run(strategy, members, settings, rounds=3, start=kept)
    assert equal(resumed.state, run(strategy, members, settings, rounds=3).state)


def test_a_round_that_cannot_be_told_is_not_kept(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    """The log and the checkpoints agree: a round is in both, or it is done again."""
    trainable, checkpoints = make_trainable(), Checkpoints(tmp_path, "identity")

    def emit(event: Event) -> None:
        assert isinstance(event, RoundDone)
        assert (kept := checkpoints.newest()) is None or kept.round == event.round - 1
        if event.round == 2:
            raise UserError("no space left")

    with pytest.raises(UserError, match="no space left"):
        run_rounds(
            FedAvg(),
            InProcessEngine(trainable, [make_member("a")], settings, lambda name, turn, step: None),
            Checkpoint(0, FedAvg().init(trainable.state()), {}),
            rounds=2,
            arm="arm",
            checkpoints=checkpoints,
            emit=emit,
            tokens=lambda: (0, None),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]
