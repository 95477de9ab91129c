"""Worker processes: the same bits as in one process, the same errors, and no hang when one dies."""

import operator
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allmend.errors import UserError
from allmend.events import RoundDone
from allmend.federation.engines.workers import WorkerEngine
from allmend.federation.member import LEARNT
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.learn.loop import DivergedError, Step
from allmend.learn.private import RecordNoise
from allmend.recipe import Train
from allmend.strategy import State, Task, Turn, grouped

pytestmark = pytest.mark.timeout(120)


class Workers:
    """Two workers over three members, and the steps they told of."""

    def __init__(self, trainable: Any, members: list[Any], settings: Train) -> None:
        self.trainable, self.members = trainable, members
        self.steps: list[tuple[str, int, Step]] = []
        self.deadly = False
        self.engine = WorkerEngine(
            trainable,
            members,
            settings,
            self.on_step,
            workers=2,
            threads=1,
        )

        self.ignored = [_ignored(worker.process.pid) for worker in self.engine._workers]

    def on_step(self, name: str, turn: Turn, step: Step) -> None:
        self.steps.append((name, turn.round, step))
        if self.deadly:
            self.kill()

    def kill(self) -> None:
        for worker in self.engine._workers:
            worker.process.kill()
            worker.process.join(10)


def _ignored(pid: int) -> set[int]:
    """The signals that a process ignores."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


@pytest.fixture(scope="module")
def workers(make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train) -> Iterator[Workers]:
    noise = RecordNoise(1.0, 0.5, "poisson", "seeded")
    members = [make_member("b"), make_member("c"), replace(make_member("a"), noise=noise)]
    made = Workers(make_trainable(), members, settings)
    yield made
    made.engine.close()
    assert not any(worker.process.is_alive() for worker in made.engine._workers)


def test_workers_end_at_the_same_bits_and_tell_the_same_errors(
    workers: Workers, run: Callable[..., Any], settings: Train
) -> None:
    for strategy in (FedAvg(participation=0.7, seed=1), Local()):
        workers.steps.clear()
        apart = run(strategy, workers.members, settings, rounds=2, engine=workers.engine, trainable=workers.trainable)
        here = run(strategy, workers.members, settings, rounds=2)
        pairs = [(apart.state, here.state), *((apart.states[name], here.states[name]) for name in here.states)]
        for first, second in pairs:
            assert first.facts == second.facts
            assert first.tensors.keys() == second.tensors.keys()
            assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in second.tensors)
        assert any(LEARNT in state.tensors for state in apart.states.values())
        rounds = [(e.clients, e.sent, e.received) for e in apart.events if isinstance(e, RoundDone)]
        assert rounds == [(e.clients, e.sent, e.received) for e in here.events if isinstance(e, RoundDone)]
        # every step of everybody is told, with its round
        expected = {name: int(state.facts["steps"]) for name, state in here.states.items() if state.facts}
        assert {name: sum(n == name for n, _, _ in workers.steps) for name in expected} == expected
    # a mistake at a member arrives as what it is
    start = {name: torch.full_like(tensor, torch.nan) for name, tensor in workers.trainable.state().items()}
    tasks = {"b": Task(Turn(1, 0, 1), start)}
    with pytest.raises(DivergedError, match="client 'b', round 1: training diverged") as raised:
        list(workers.engine.work(FedAvg(), tasks))
    assert "learning_rate" in str(raised.value.hint)
    odd: Any = SimpleNamespace(work=operator.add)
    with pytest.raises(TypeError, match="MemberClient"):  # and so does a bug
        list(workers.engine.work(odd, tasks))


def test_ctrl_c_goes_to_the_parent_alone_from_the_first_moment(workers: Workers) -> None:
    assert all(signal.SIGINT in ignored for ignored in workers.ignored)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_restored_states_reach_the_workers(workers: Workers) -> None:
    engine, own = workers.engine, {name: torch.zeros_like(t) for name, t in workers.trainable.state().items()}
    workers.steps.clear()
    engine.restore({"a": State(grouped("model", own), {"steps": 6})})
    assert engine.states()["b"] == State()
    assert engine.members == ["a", "b", "c"]
    tasks = Local().plan(State(), Turn(4, 0, 5), engine.members)
    list(engine.work(Local(), tasks))
    assert engine.states()["a"].facts["steps"] == 8
    assert engine.states()["b"].facts["steps"] == 2
    assert [step.number for name, _, step in workers.steps if name == "a"] == [7, 8]


def test_only_the_cpu_can_be_shared(make_trainable: Callable[..., Any], settings: Train) -> None:
    trainable = make_trainable()
    trainable.model.to("meta")
    with pytest.raises(UserError, match=r"engine.workers.*CPU"):
        WorkerEngine(trainable, [], settings, lambda name, turn, step: None, workers=1)


# kills the workers, so it stands last
def test_a_killed_worker_is_told_and_does_not_hang(workers: Workers) -> None:
    strategy = FedAvg()
    state = strategy.init(workers.trainable.state())
    list(workers.engine.work(strategy, strategy.plan(state, Turn(1, 0, 2), workers.engine.members)))  # they are up
    workers.deadly = True
    tasks = strategy.plan(state, Turn(2, 0, 2), workers.engine.members)
    with pytest.raises(UserError, match=r"client '[ab]': the worker process died \(exit code -9\)"):
        list(workers.engine.work(strategy, tasks))
    with pytest.raises(UserError, match="died"):  # and they are dead before they get anything
        list(workers.engine.work(strategy, tasks))
