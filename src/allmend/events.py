"""The event log of a run: typed, versioned lines of JSON.

Whatever happens in a run is an event appended to `events.jsonl`. The terminal's progress, TensorBoard and the
report are readers of it and of nothing else that moves. A line is written whole or not at all as far as
readers are concerned: a torn last line (a killed process) is ignored.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

VERSION = 1

LONGEST = 4000
"""Characters of a warning."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    v: int = VERSION
    time: float = 0.0
    """Seconds since the epoch, set when the event is written."""


class RunStarted(_Event):
    """A process begins work on the run. `work` is the whole plan in token passes (see `WorkDone`), by phase."""

    type: Literal["run.started"] = "run.started"
    run: str
    allmend: str
    versions: dict[str, str]
    machine: str
    threads: int
    model: str
    clients: dict[str, int]
    """Training records by client, canaries included."""
    held_out: dict[str, int]
    notes: dict[str, dict[str, int]] = {}
    """Counts worth telling, by client: duplicates, truncated and rejected records."""
    work: dict[str, float]
    resumed: bool = False


class ArmStarted(_Event):
    """An arm (a strategy with its settings) begins at `round`; what it logged for later rounds is void."""

    type: Literal["arm.started"] = "arm.started"
    arm: str
    strategy: str
    round: int
    rounds: int
    trainable: int
    """Parameters that learn, and therefore travel where the strategy sends them."""


class UpdateSeen(BaseModel):
    """The size of an optimiser step; see `allmend.learn.updates.UpdateSize`."""

    model_config = ConfigDict(frozen=True)

    length: float
    angle: float | None
    farthest: str
    far: int
    matrices: int


class StepDone(_Event):
    """One optimiser step of a client."""

    type: Literal["step"] = "step"
    arm: str
    client: str
    round: int
    step: int
    """Counts this client's steps over all rounds of the arm, from 1."""
    loss: float
    """Mean negative log-likelihood per token that the loss looked at (nats)."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Tokens that went through the model in this step."""
    update: UpdateSeen | None = None
    """How large the step was, where that is logged and this one was looked at."""


class RoundDone(_Event):
    """A round is combined and checkpointed."""

    type: Literal["round"] = "round"
    arm: str
    round: int
    """Counts from 1."""
    clients: list[str]
    sent: dict[str, int]
    """Bytes of tensors from the coordinator, by client; numbers and names are not counted."""
    received: dict[str, int]
    """Bytes of tensors to the coordinator, by client."""
    loss: float | None
    """Training loss, as the strategy sums it over members; else over the round's steps, by tokens under the loss."""
    tokens: int
    seconds: float
    epsilon: dict[str, float] = {}
    """ε spent so far, by client for the records' guarantee, under `members` for the members'."""
    took_part: dict[str, int] = {}
    """Rounds that each client has begun to train in, broken-off tries included where they cost."""
    cut: int = 0
    """Values that were too large for the sum and were cut, over all clients (secure aggregation)."""
    training_seconds: float
    """Of `seconds`, the part spent in clients' work; the rest is exchange, aggregation and checkpoint."""


class PhaseDone(_Event):
    """A phase is over (`evaluate base`, `train fedavg`, `audit fedavg`, …)."""

    type: Literal["phase"] = "phase"
    phase: str
    seconds: float
    tokens: int


class WorkDone(_Event):
    """Progress inside a phase: `share` (0 … 1) of the work that was announced for it."""

    type: Literal["progress"] = "progress"
    phase: str
    share: float


class WorkPlanned(_Event):
    """Work on models that are there already begins, such as another audit; `work` as in `RunStarted`."""

    type: Literal["work.planned"] = "work.planned"
    work: dict[str, float]


class Offered(_Event):
    """A run among organisations is offered to its members; what they agree to has this digest."""

    type: Literal["offered"] = "offered"
    digest: str
    members: list[str]


class Joined(_Event):
    """Members have agreed to a run among organisations; it goes on with them."""

    type: Literal["joined"] = "joined"
    members: list[str]


class Waiting(_Event):
    """Members elsewhere are waited for. Written when another set of them is away than before, and once a minute."""

    type: Literal["waiting"] = "waiting"
    members: list[str]
    away: list[str]
    """Those of them that have not been heard of lately."""


def _told(words: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in words[:LONGEST])


Told = Annotated[str, AfterValidator(_told)]
"""Words that may come from elsewhere: cut off after `LONGEST`, and without what is not to be printed."""


class Warned(_Event):
    """Something the user should know and the run survives."""

    type: Literal["warning"] = "warning"
    message: Told


class Stopped(_Event):
    """The run ended before its end; `cause` says why."""

    type: Literal["stopped"] = "stopped"
    cause: Told
    resumable: bool = True
    """False where going on would only meet the same end (training diverged)."""


class RunFinished(_Event):
    """Everything the recipe asked for is done; `seconds` counts all sessions of work on the run."""

    type: Literal["run.finished"] = "run.finished"
    seconds: float


Event = Annotated[
    RunStarted
    | WorkPlanned
    | Offered
    | Joined
    | Waiting
    | ArmStarted
    | StepDone
    | RoundDone
    | PhaseDone
    | WorkDone
    | Warned
    | Stopped
    | RunFinished,
    Field(discriminator="type"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def read_events(path: Path) -> Iterator[Event]:
    """The events of a log in order, without those that a resumption made void and without a torn last line.

    Raises:
        ValueError: a line other than the last is not an event of this version.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            events.append(_EVENT.validate_json(line))
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer was killed in the middle
                break
            raise ValueError(f"{path}:{number}: not an event of version {VERSION}: {error}") from error
    yield from _without_void(events)


def _without_void(events: list[Event]) -> Iterator[Event]:
    """Drop steps and rounds of an arm that a later `ArmStarted` of it starts again."""
    restart: dict[str, int] = {}
    kept: list[Event] = []
    for event in reversed(events):
        if isinstance(event, ArmStarted):
            restart[event.arm] = min(event.round, restart.get(event.arm, event.round))
        elif isinstance(event, StepDone | RoundDone) and event.round >= restart.get(event.arm, 1 << 62):
            continue
        kept.append(event)
    yield from reversed(kept)


def to_all(listeners: Iterable[Callable[[Event], None]]) -> Callable[[Event], None]:
    """A function that tells every listener of an event, where no run keeps it."""

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


def dump_event(event: Event) -> bytes:
    """One line of the log, newline included."""
    return json.dumps(event.model_dump(), ensure_ascii=False, allow_nan=False).encode() + b"\n"
