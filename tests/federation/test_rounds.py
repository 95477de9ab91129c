"""Rounds: what is sent and summed, what stops them, and that they go on where they stopped."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.errors import UserError
from allmend.events import Event, RoundDone
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines import Answer
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.rounds import run_rounds
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.models.tensors import nbytes
from allmend.recipe import Train
from allmend.strategy import Declaration, Reply, State, Strategy, Task


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
                name = sorted(answer.reply.summed)[0]
                spoilt = Reply({**answer.reply.summed, name: self.bad}, answer.reply.summed_facts)  # type: ignore[dict-item]
                answer = Answer(answer.member, spoilt)
            yield answer


@pytest.mark.parametrize("bad", [torch.tensor(torch.nan), torch.tensor([1.0, torch.inf]), torch.zeros(1, 1)])
def test_a_reply_that_cannot_be_summed_names_the_member_and_keeps_the_round_before(
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
        run(FedAvg(), members, settings, rounds=3, engine=engine, trainable=trainable, folder=tmp_path)
    kept = Checkpoints(tmp_path, "identity").newest()
    assert kept is not None
    assert kept.round == 1
    resumed = run(FedAvg(), members, settings, rounds=3, start=kept)
    assert equal(resumed.state, run(FedAvg(), members, settings, rounds=3).state)


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
