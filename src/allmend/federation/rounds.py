"""The rounds of a federation: plan, work, sum, combine, checkpoint, on whatever engine."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from allmend.errors import UserError
from allmend.events import Event, RoundDone, Warned
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines import Answer, Engine
from allmend.federation.privacy.ledger import NO_LEDGER, Ledger
from allmend.models.tensors import Tensors, is_finite, nbytes
from allmend.strategy import Reply, Seen, Strategy, Sums, Task, Turn

Observer: TypeAlias = Callable[[int, str | None, Tensors], None]
"""Told what can be seen of a round: the round, a member, and its model as its reply reveals it; or None and the model
that is sent to all after the round."""


def run_rounds(
    strategy: Strategy,
    engine: Engine,
    start: Checkpoint,
    *,
    rounds: int,
    arm: str,
    checkpoints: Checkpoints,
    emit: Callable[[Event], None],
    tokens: Callable[[], tuple[int, float | None]],
    ledger: Ledger = NO_LEDGER,
    observe: Observer | None = None,
) -> Checkpoint:
    """Run the rounds after `start.round`, as far as the ledger can afford them, and return the last one's outcome.

    Args:
        strategy: what coordinator and members do.
        engine: carries the messages.
        start: where to go on; round 0 is the beginning.
        rounds: of the whole run.
        arm: name for events.
        checkpoints: where each round's states go.
        emit: writes events.
        tokens: tokens trained on since it was last asked, and the mean loss over them.
        ledger: of the arm's guarantees.
        observe: told what each party can see, for an audit.

    Raises:
        UserError: a member's training diverged, a reply is not finite, or a checkpoint cannot be written. The last
            checkpoint is whole.
    """
    state, took_part = start.server, dict(start.took_part)
    engine.restore(start.members)
    for round in range(start.round + 1, rounds + 1):
        began, traffic = time.perf_counter(), Traffic()
        for leg in range(strategy.legs):
            turn = Turn(round, leg, rounds, len(engine.members))
            tasks = strategy.plan(state, turn, engine.members)
            if leg == 0:
                if spent := ledger.exhausted(took_part, round - 1, tasks):
                    emit(Warned(message=_BUDGET.format(arm, round - 1, rounds, ", ".join(spent))))
                    return Checkpoint(round - 1, state, engine.states(), took_part)
                for name in tasks:
                    took_part[name] = took_part.get(name, 0) + 1
                if ledger.anew:  # replies of a round that is broken off were seen, and those of its second try will be
                    checkpoints.begin(round, took_part)
            sums, seen = play_leg(strategy, engine, tasks, turn, traffic, observe)
            state = strategy.combine(state, turn, sums, seen)
        if observe and (shared := strategy.shared(state)) is not None:
            observe(round, None, shared)
        trained, loss = tokens()
        done = RoundDone(
            arm=arm,
            round=round,
            clients=sorted(traffic.members & set(traffic.sent)),
            sent=traffic.sent,
            received=traffic.received,
            # a loss without noise would be a release of its own
            loss=None if ledger.accounts else loss if traffic.loss is None else traffic.loss,
            tokens=trained,
            seconds=0.0,
            training_seconds=traffic.waited,
            epsilon=ledger.spent(took_part, round),
            took_part=dict(took_part),
            cut=traffic.cut,
        )
        checkpoint = Checkpoint(round, state, engine.states(), took_part)
        checkpoints.save(checkpoint, announce=partial(_announce, done, began, emit))
    return Checkpoint(rounds, state, engine.states(), took_part)


@dataclass
class Traffic:
    """What a round's legs come to.

    Attributes:
        sent, received: bytes of tensors by member.
        members: whose replies count.
        waited: seconds until replies were there.
        cut: values that were cut to what fits a sum.
        loss: training loss, where the strategy sums it.
    """

    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)
    waited: float = 0.0
    cut: int = 0
    loss: float | None = None


def play_leg(
    strategy: Strategy,
    engine: Engine,
    tasks: Mapping[str, Task],
    turn: Turn,
    traffic: Traffic,
    observe: Observer | None = None,
) -> tuple[Sums, dict[str, Seen]]:
    """Have members work on their tasks; gives what `combine` may look at, and adds to the traffic.

    Raises:
        UserError: a reply is not finite, or too few members answer.
    """
    declaration = strategy.declare()
    sums, seen = Sums(), dict[str, Seen]()
    traffic.members |= set(tasks)
    answers = _Timed(engine.work(strategy, tasks))
    for answer in answers:
        name, reply = answer.member, answer.reply
        if undeclared := declaration.undeclared(reply):
            raise TypeError(f"strategy {strategy.name!r} returns what it did not declare: {undeclared}")
        _add(sums, reply, name, turn.round)
        seen[name] = Seen(reply.seen, reply.seen_facts)
        traffic.sent[name] = traffic.sent.get(name, 0) + nbytes(tasks[name].tensors)
        size = nbytes(reply.summed) + nbytes(reply.seen) + answer.hidden
        traffic.received[name] = traffic.received.get(name, 0) + size
        # behind masks a reply has none of what a model could be rebuilt from
        if observe and not answer.hidden and (revealed := strategy.revealed(tasks[name], reply)) is not None:
            observe(turn.round, name, revealed)
    traffic.waited += answers.seconds
    if (hidden := engine.summed()) is not None:
        sums = hidden[0]
        traffic.members &= set(hidden[1])
    traffic.cut += sums.cut
    if weight := sums.fact("weight"):
        traffic.loss = sums.fact("loss") / weight if "loss" in sums else None
    return sums, seen


_BUDGET = "{}: the privacy budget ends the training after round {} of {} (another would exceed that of {})"


@dataclass
class _Timed:
    """Answers, and the seconds that waiting for them took."""

    answers: Iterator[Answer]
    seconds: float = 0.0

    def __iter__(self) -> Iterator[Answer]:
        while True:
            start = time.perf_counter()
            answer = next(self.answers, None)
            self.seconds += time.perf_counter() - start
            if answer is None:
                return
            yield answer


def _announce(done: RoundDone, began: float, emit: Callable[[Event], None]) -> None:
    emit(done.model_copy(update={"seconds": time.perf_counter() - began}))


def _add(sums: Sums, reply: Reply, member: str, round: int) -> None:
    try:
        for key, tensor in reply.seen.items():
            if not is_finite(tensor):
                raise ValueError(f"tensor {key!r} holds NaN or infinite values")
        sums.add(reply)
    except ValueError as error:
        raise UserError(
            f"the reply cannot be used: {error}",
            where=f"client {member!r}, round {round}",
            hint="Lower train.learning_rate if its training diverged; all members need the same model and adapter.",
        ) from error
