"""How a run stands: its event log in a few figures, for the run and for each member."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from allmend.events import (
    ArmStarted,
    Event,
    Joined,
    Offered,
    PhaseDone,
    RoundDone,
    RunFinished,
    RunStarted,
    StepDone,
    Stopped,
    Waiting,
    Warned,
    WorkDone,
)
from allmend.run import RunFolder

State = Literal["running", "finished", "stopped", "not running"]
"""`not running`: no end was written and no process is at work: it was killed, or its machine went down."""

LATELY = 5
"""Rounds that the time of a round is told from."""


@dataclass(frozen=True)
class ArmStanding:
    """How far an arm is.

    Attributes:
        name: of the arm.
        strategy: its strategy.
        round: rounds that are done.
        rounds: of the whole arm.
        loss: training loss of the last round; None where nobody knows it.
        seconds: of a round lately (median); None before the first.
        epsilon: ε spent so far, by whom it protects.
    """

    name: str
    strategy: str
    round: int
    rounds: int
    loss: float | None = None
    seconds: float | None = None
    epsilon: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end of the arm at the pace of the last rounds."""
        return None if self.seconds is None else self.seconds * (self.rounds - self.round)


@dataclass(frozen=True)
class MemberStanding:
    """What is known of a member.

    Attributes:
        name: the member's.
        rounds: that it took part in, over all arms.
        last: when the last of them was done (seconds since the epoch).
        sent, received: bytes of tensors to it and from it, over all arms.
        away: whether it was last known to be away; None in a simulation.
        waited_for: whether the coordinator waits for it.
    """

    name: str
    rounds: int = 0
    last: float | None = None
    sent: int = 0
    received: int = 0
    away: bool | None = None
    waited_for: bool = False


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        run: its name.
        state: whether somebody works on it.
        cause: why it stopped.
        onward: how to go on with it, in a sentence; empty where nobody need do anything.
        allmend: version that works on it.
        model: its base model.
        offer: digest that members agree to; None in a simulation.
        begun: when the first process started (seconds since the epoch).
        latest: when the last event was written.
        phase: what it is at, in words; empty where it is at nothing.
        arms: in their order, as far as they have begun.
        members: in their order.
        warnings: each once.
    """

    run: str
    state: State
    cause: str = ""
    onward: str = ""
    allmend: str = ""
    model: str = ""
    offer: str | None = None
    begun: float | None = None
    latest: float | None = None
    phase: str = ""
    arms: tuple[ArmStanding, ...] = ()
    members: tuple[MemberStanding, ...] = ()
    warnings: tuple[str, ...] = ()


def standing(run: RunFolder) -> Standing:
    """How a run stands now.

    Raises:
        UserError: its log cannot be read.
    """
    events = run.history()
    start = next((event for event in reversed(events) if isinstance(event, RunStarted)), None)
    end = next((e for e in reversed(events) if isinstance(e, RunStarted | Stopped | RunFinished)), None)
    state: State = "running" if run.worked_on else "not running"
    match end:
        case RunFinished():
            state = "finished"
        case Stopped() if state != "running":
            state = "stopped"
    times = [event.time for event in events if event.time > 0]
    return Standing(
        run=start.run if start else run.path.name,
        state=state,
        cause=end.cause if isinstance(end, Stopped) and state == "stopped" else "",
        onward=_onward(run, events, end) if state in ("stopped", "not running") else "",
        allmend=start.allmend if start else "",
        model=start.model if start else "",
        offer=next((event.digest for event in reversed(events) if isinstance(event, Offered)), None),
        begun=min(times, default=None),
        latest=max(times, default=None),
        phase=_phase(events) if state == "running" else "",
        arms=_arms(events),
        members=_members(events, running=state == "running"),
        warnings=tuple(dict.fromkeys(event.message for event in events if isinstance(event, Warned))),
    )


def _onward(run: RunFolder, events: Sequence[Event], end: Event | None) -> str:
    if isinstance(end, Stopped) and not end.resumable:
        return "Going on would only meet the same end: start a new run."
    if any(isinstance(event, Offered) for event in events):
        return "The same command that started it goes on with it."
    return f"Go on with it: allmend tune --resume {run.path}"


def _arms(events: Sequence[Event]) -> tuple[ArmStanding, ...]:
    begun: dict[str, ArmStarted] = {}
    rounds: dict[str, list[RoundDone]] = {}
    for event in events:
        match event:
            case ArmStarted():
                begun[event.arm] = event
            case RoundDone():
                rounds.setdefault(event.arm, []).append(event)
    found = []
    for name, arm in begun.items():
        done = rounds.get(name, [])
        lately = [event.seconds for event in done[-LATELY:]]
        found.append(
            ArmStanding(
                name=name,
                strategy=arm.strategy,
                round=done[-1].round if done else 0,
                rounds=arm.rounds,
                loss=done[-1].loss if done else None,
                seconds=statistics.median(lately) if lately else None,
                epsilon=done[-1].epsilon if done else {},
            )
        )
    return tuple(found)


def _members(events: Sequence[Event], *, running: bool) -> tuple[MemberStanding, ...]:
    names: dict[str, None] = {}
    waiting: Waiting | None = None
    elsewhere = False
    rounds = [event for event in events if isinstance(event, RoundDone)]
    for event in events:
        match event:
            case Offered():
                elsewhere = True
                names |= dict.fromkeys(event.members)
            case RunStarted():
                names |= dict.fromkeys(event.clients)
                waiting = None
            case Waiting():
                waiting = event
            case RoundDone() | PhaseDone() | Joined():  # it came, or is waited for no longer
                waiting = None if waiting is None or not waiting.away else Waiting(members=[], away=waiting.away)
    for done in rounds:
        names |= dict.fromkeys(done.clients)
    return tuple(_member(name, rounds, waiting if running else None, elsewhere=elsewhere) for name in names)


def _member(name: str, rounds: Sequence[RoundDone], waiting: Waiting | None, *, elsewhere: bool) -> MemberStanding:
    own = [done for done in rounds if name in done.clients]
    return MemberStanding(
        name=name,
        rounds=len(own),
        last=own[-1].time if own else None,
        sent=sum(done.sent.get(name, 0) for done in own),
        received=sum(done.received.get(name, 0) for done in own),
        away=(waiting is not None and name in waiting.away) if elsewhere else None,
        waited_for=waiting is not None and name in waiting.members,
    )


def _phase(events: Sequence[Event]) -> str:
    """What the run is at, from the newest event that tells."""
    for event in reversed(events):
        match event:
            case StepDone():
                return f"{event.arm}: round {event.round}, {event.client} trains"
            case RoundDone():
                if (arm := _arm(events, event.arm)) and event.round < arm.rounds:
                    return f"{event.arm}: round {event.round + 1} of {arm.rounds}"
                return f"after {event.arm}"
            case ArmStarted():
                return f"{event.arm}: round {event.round} of {event.rounds}"
            case WorkDone():
                return event.phase
            case PhaseDone():
                return f"after {event.phase}"
            case Joined():
                return "begins"
            case Offered():
                return "members are asked to join"
            case RunStarted():
                return "starts"
    return ""


def _arm(events: Sequence[Event], name: str) -> ArmStarted | None:
    return next((e for e in reversed(events) if isinstance(e, ArmStarted) and e.arm == name), None)
