"""The rounds of a federation: plan, work, sum, combine, checkpoint, on whatever engine."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from allmend.errors import UserError
from allmend.events import Event, RoundDone, Warned
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines import Answer, Engine
from allmend.federation.privacy.ledger import NO_LEDGER, Ledger
from allmend.models.tensors import Tensors, is_finite, nbytes
from allmend.strategy import Reply, Seen, Strategy, Sums, Turn

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
    declaration = strategy.declare()
    for round in range(start.round + 1, rounds + 1):
        began = time.perf_counter()
        sent: dict[str, int] = {}
        received: dict[str, int] = {}
        working, cut = 0.0, 0
        summed_loss: float | None = None
        counted = set[str]()
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
            sums, seen = Sums(), {}
            counted |= set(tasks)
            answers = _Timed(engine.work(strategy, tasks))
            for answer in answers:
                name, reply = answer.member, answer.reply
                if undeclared := declaration.undeclared(reply):
                    raise TypeError(f"strategy {strategy.name!r} returns what it did not declare: {undeclared}")
                _add(sums, reply, name, round)
                seen[name] = Seen(reply.seen, reply.seen_facts)
                sent[name] = sent.get(name, 0) + nbytes(tasks[name].tensors)
                received[name] = received.get(name, 0) + nbytes(reply.summed) + nbytes(reply.seen) + answer.hidden
                if observe and (revealed := strategy.revealed(tasks[name], reply)) is not None:
                    observe(round, name, revealed)
            working += answers.seconds
            if (hidden := engine.summed()) is not None:
                sums, counted = hidden[0], counted & set(hidden[1])
            cut += sums.cut
            state = strategy.combine(state, turn, sums, seen)
            if weight := sums.fact("weight"):
                summed_loss = sums.fact("loss") / weight if "loss" in sums else None
        if observe and (shared := strategy.shared(state)) is not None:
            observe(round, None, shared)
        trained, loss = tokens()
        done = RoundDone(
            arm=arm,
            round=round,
            clients=sorted(counted & set(sent)),
            sent=sent,
            received=received,
            # a loss without noise would be a release of its own
            loss=None if ledger.accounts else loss if summed_loss is None else summed_loss,
            tokens=trained,
            seconds=0.0,
            training_seconds=working,
            epsilon=ledger.spent(took_part, round),
            took_part=dict(took_part),
            cut=cut,
        )
        checkpoint = Checkpoint(round, state, engine.states(), took_part)
        checkpoints.save(checkpoint, announce=partial(_announce, done, began, emit))
    return Checkpoint(rounds, state, engine.states(), took_part)


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
