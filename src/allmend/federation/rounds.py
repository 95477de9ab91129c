"""The rounds of a federation: plan, work, sum, combine, checkpoint, on whatever engine."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from allmend.errors import UserError
from allmend.events import Event, RoundDone
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines import Answer, Engine
from allmend.models.tensors import nbytes
from allmend.strategy import Reply, Seen, State, Strategy, Sums, Turn


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
) -> State:
    """Run the rounds after `start.round` and return the coordinator's state after the last.

    Args:
        strategy: what coordinator and members do.
        engine: carries the messages.
        start: where to go on; round 0 is the beginning.
        rounds: of the whole run.
        arm: name for events.
        checkpoints: where each round's states go.
        emit: writes events.
        tokens: tokens trained on since it was last asked, and the mean loss over them.

    Raises:
        UserError: a member's training diverged, a reply is not finite, or a checkpoint cannot be written. The last
            checkpoint is whole.
    """
    state = start.server
    engine.restore(start.members)
    declaration = strategy.declare()
    for round in range(start.round + 1, rounds + 1):
        began = time.perf_counter()
        sent: dict[str, int] = {}
        received: dict[str, int] = {}
        working = 0.0
        summed_loss: float | None = None
        for leg in range(strategy.legs):
            turn = Turn(round, leg, rounds)
            tasks = strategy.plan(state, turn, engine.members)
            sums, seen = Sums(), {}
            answers = _Timed(engine.work(strategy, tasks))
            for answer in answers:
                name, reply = answer.member, answer.reply
                if undeclared := declaration.undeclared(reply):
                    raise TypeError(f"strategy {strategy.name!r} returns what it did not declare: {undeclared}")
                _add(sums, reply, name, round)
                seen[name] = Seen(reply.seen, reply.seen_facts)
                sent[name] = sent.get(name, 0) + nbytes(tasks[name].tensors)
                received[name] = received.get(name, 0) + nbytes(reply.summed) + nbytes(reply.seen)
            working += answers.seconds
            state = strategy.combine(state, turn, sums, seen)
            if weight := sums.fact("weight"):
                summed_loss = sums.fact("loss") / weight
        trained, loss = tokens()
        done = RoundDone(
            arm=arm,
            round=round,
            clients=sorted(sent),
            sent=sent,
            received=received,
            loss=loss if summed_loss is None else summed_loss,
            tokens=trained,
            seconds=0.0,
            training_seconds=working,
        )
        checkpoints.save(Checkpoint(round, state, engine.states()), announce=partial(_announce, done, began, emit))
    return state


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
        sums.add(reply)
    except ValueError as error:
        raise UserError(
            f"the reply cannot be summed: {error}",
            where=f"client {member!r}, round {round}",
            hint="Lower train.learning_rate if its training diverged; all members need the same model and adapter.",
        ) from error
