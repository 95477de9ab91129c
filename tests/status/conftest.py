"""Runs in the making: folders with an event log and, where somebody works on them, a lock."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from allmend.events import ArmStarted, Event, Offered, RoundDone, RunStarted
from allmend.run import EventLog, RunFolder

Clock = Callable[[], float]


class Begun:
    """A run folder to which events can be added; one second passes with each."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.folder = RunFolder.create(path, "", {})
        self._stack, self._now = stack, 1000.0
        self._log = EventLog(self.folder.events, clock=self._tick)

    def _tick(self) -> float:
        self._now += 1.0
        return self._now

    def add(self, *events: Event) -> None:
        for event in events:
            self._log.emit(event)

    def work(self) -> None:
        """Hold the lock, as a process at work does."""
        self._stack.enter_context(self.folder.lock())


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Begun]:
    with ExitStack() as stack:
        yield Begun(tmp_path / "run", stack)


def started(*clients: str) -> RunStarted:
    return RunStarted(
        run="joint", allmend="1.2", versions={}, machine="m", threads=1, model="some/model",
        clients=dict.fromkeys(clients, 5), held_out={}, work={"train fedavg": 1.0},
    )  # fmt: skip


def arm(name: str = "fedavg", *, round: int = 1, rounds: int = 3) -> ArmStarted:
    return ArmStarted(arm=name, strategy="fedavg", round=round, rounds=rounds, trainable=10)


def done(round: int, *clients: str, seconds: float = 10.0, loss: float | None = 2.0, name: str = "fedavg") -> RoundDone:
    return RoundDone(
        arm=name, round=round, clients=list(clients), sent=dict.fromkeys(clients, 100),
        received=dict.fromkeys(clients, 40), loss=loss, tokens=0, seconds=seconds, training_seconds=1.0,
        epsilon={"members": 0.5 * round},
    )  # fmt: skip


OFFERED = Offered(digest="ab" * 32, members=["a", "b", "c"])
