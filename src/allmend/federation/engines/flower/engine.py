"""`Engine` over members on other machines."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from allmend.errors import UserError
from allmend.events import Event, Warned
from allmend.federation.engines import Answer
from allmend.federation.engines.flower.exchange import FACTS, Exchange
from allmend.federation.engines.flower.hidden import Hiding, ask_sum
from allmend.federation.engines.wire import dump_task, error_of, parse_reply, task_digest
from allmend.federation.member import change
from allmend.federation.privacy.secure_sum import ProtocolError
from allmend.models.tensors import is_finite, parse
from allmend.run import write_atomic
from allmend.strategy import Layout, Reply, State, Strategy, Sums, Task, Turn, of_group, shapes

SUSPENDED = 3
"""Rounds in a row that a member may miss before it is no longer asked."""

ROUNDING = 1e-3
"""By how much a change that was scaled down to its bound may come out above it."""

TRIES = 3
"""Times that a sum is tried while enough members answer; a member that begins anew in the middle breaks one off."""


@dataclass
class FlowerEngine:
    """Asks members over the network; their states stay with them.

    Attributes:
        exchange: carries questions and answers.
        names: of the members that have joined.
        arm: that this engine works for.
        run: digest of the offer that the members have agreed to.
        seconds: that a leg of a round may take.
        fewest: members that must answer.
        emit: writes events.
        hiding: what is agreed on about sums, where they are formed out of sight.
        largest: bytes of a reply; larger ones are kept out.
        layout: shapes of what members may sum (`Strategy.layout`); None leaves it unchecked.
        largest_update: norm of a member's change, over which its reply is left out, where it can be seen.
        frozen: digest of the factors that each side makes for itself (`Trainable.frozen_digest`); a member whose are
            others refuses to work.
        counted: round and leg of each member's last reply that counted. A member goes on from its state then; what it
            kept of a reply that was lost is void.
        opening: file that keeps in mind over whom a sum was about to be opened, for whoever begins anew.
        may_open: told over whom a sum is about to be opened; raises `UserError` where that must not be.
    """

    exchange: Exchange
    names: Sequence[str]
    arm: str
    run: str
    seconds: float
    fewest: int
    emit: Callable[[Event], None]
    largest: int = FACTS
    hiding: Hiding | None = None
    layout: Layout | None = None
    largest_update: float | None = None
    frozen: str = ""
    opening: Path | None = None
    may_open: Callable[[Turn, list[str]], None] = lambda turn, survivors: None
    counted: dict[str, tuple[int, int]] = field(init=False, default_factory=dict)
    _worked: tuple[Turn, str, list[str]] | None = field(init=False, default=None)
    _missed: dict[str, int] = field(init=False, default_factory=dict)

    @property
    def members(self) -> list[str]:
        return sorted(name for name in self.names if self._missed.get(name, 0) < SUSPENDED)

    def work(self, strategy: Strategy, tasks: Mapping[str, Task]) -> Iterator[Answer]:
        about = {"ask": "work", "run": self.run, "arm": self.arm, "frozen": self.frozen}
        questions = {
            name: dump_task(task, about=about | {"counted": self.counted.get(name)}) for name, task in tasks.items()
        }
        turn = next(iter(tasks.values())).turn
        digests = {task_digest(task) for task in tasks.values()} if self.hiding else {""}
        if len(digests) > 1:
            raise UserError("a sum out of sight is of work on one task, and members have several", where=self.arm)
        answered: list[str] = []
        largest = max(self.largest, *(_room(task.seen or {}) for task in tasks.values()))
        for name, data in self.exchange.ask(questions, seconds=self.seconds, largest=largest):
            answer = None if data is None else self._read(strategy, tasks[name], name, data)
            if answer is None:
                self._miss(name, turn.round, came=data is not None)
                continue
            answered.append(name)
            yield answer
        self._worked = turn, digests.pop(), answered
        if self.hiding is None:
            self._count(turn, answered)
        if len(answered) < self.fewest:
            raise UserError(
                f"{len(answered)} of {len(tasks)} members answered in round {turn.round}, and {self.fewest} are the "
                "fewest",
                where=f"arm {self.arm!r}",
                hint="Run the same command again when more of them are there; the last round is kept.",
            )

    def _count(self, turn: Turn, names: Sequence[str]) -> None:
        self.counted |= dict.fromkeys(names, (turn.round, turn.leg))
        self._missed |= dict.fromkeys(names, 0)

    def summed(self) -> tuple[Sums, list[str]] | None:
        if self.hiding is None:
            return None
        assert self._worked is not None, "work comes first"
        turn, task, worked = self._worked
        names = worked if (begun := self._begun(turn)) is None else begun
        for tries_left in reversed(range(TRIES)):
            if missing := sorted(set(names) - set(worked)):
                raise self._half_opened(turn, f"{', '.join(missing)} did not answer")
            lost: list[str] = []
            try:
                sums, survivors = ask_sum(
                    self.exchange,
                    self.hiding,
                    turn,
                    task,
                    names,
                    seconds=self.seconds,
                    warn=lambda words: self.emit(Warned(message=words)),
                    opening=partial(self._begin, turn),
                    silent=lost.append,
                )
            except ProtocolError as error:
                begun = self._begun(turn)
                names = begun or [name for name in names if name not in lost]
                if tries_left and len(names) >= self.hiding.layer.fewest and not (begun and set(begun) & set(lost)):
                    self.emit(Warned(message=f"the sum of round {turn.round} is tried again: {error.what}"))
                    continue
                if begun is not None:
                    raise self._half_opened(turn, error.what) from error
                raise
            for name in sorted(set(worked) - set(survivors)):
                self.emit(Warned(message=f"round {turn.round} goes on without what {name} worked out"))
                self._miss(name, turn.round, came=True)
            self._count(turn, survivors)
            return sums, survivors
        raise AssertionError("the last try returns or raises")

    def _half_opened(self, turn: Turn, why: str) -> UserError:
        """A sum that some members may have opened can be formed over the same members alone."""
        return UserError(
            f"the sum of round {turn.round} was begun to be opened, and is not whole: {why}",
            where=f"arm {self.arm!r}",
            hint=f"Run the same command again when all of {', '.join(self._begun(turn) or ())} are there. A sum over "
            "others would bare somebody's part; where one of them is gone for good, begin a new run.",
        )

    def _begin(self, turn: Turn, survivors: list[str]) -> None:
        self.may_open(turn, survivors)
        if self.opening is None:
            return
        if (before := self._begun(turn)) not in (None, survivors):
            raise ProtocolError(f"a sum over {', '.join(before or ())} was begun to be opened before")
        write_atomic(self.opening, json.dumps({"turn": [turn.round, turn.leg], "survivors": survivors}).encode())

    def _begun(self, turn: Turn) -> list[str] | None:
        """Over whom the sum of this turn was about to be opened before; None where none was."""
        if self.opening is None or not self.opening.exists():
            return None
        found = json.loads(self.opening.read_bytes())
        return list(found["survivors"]) if found["turn"] == [turn.round, turn.leg] else None

    def states(self) -> dict[str, State]:
        """Not the members' own, which stay with them: which of them is meant, as `counted` tells."""
        return {name: State(facts={"round": round, "leg": leg}) for name, (round, leg) in self.counted.items()}

    def restore(self, states: Mapping[str, State]) -> None:
        self.counted = {name: (int(s.facts["round"]), int(s.facts["leg"])) for name, s in states.items()}

    def close(self) -> None:
        pass

    def _read(self, strategy: Strategy, task: Task, name: str, data: bytes) -> Answer | None:
        where = f"client {name!r}, round {task.turn.round}"
        try:
            _, about = parse(data, where=where)
            if (error := error_of(about)) is not None:
                raise UserError(error, where=where)
            hidden = self.hiding.codes[task.turn.leg].nbytes if self.hiding else 0
            reply = parse_reply(data, where=where)[0]
            self._check(strategy, task, reply, where)
            return Answer(name, reply, hidden)
        except UserError as error:
            self.emit(Warned(message=str(error)))
        except Exception as error:  # whatever a member sends must not stop the others
            self.emit(Warned(message=f"{where}: the reply cannot be used ({type(error).__name__})"))
        return None

    def _check(self, strategy: Strategy, task: Task, reply: Reply, where: str) -> None:
        """Refuse a reply that would spoil the round for all: it is left out like a lost one."""
        if undeclared := strategy.declare().undeclared(reply):
            raise UserError(f"the reply holds what was not declared: {', '.join(undeclared)}", where=where)
        found = shapes(reply.summed)
        if task.seen is not None:
            odd = not shapes(reply.seen).items() <= task.seen.items()
        else:
            seen = {name.partition("/")[0]: of_group(name.partition("/")[0], reply.seen) for name in reply.seen}
            odd = bool(task.tensors) and any(shapes(tensors) != shapes(task.tensors) for tensors in seen.values())
        if odd or (self.layout is not None and any(self.layout.get(name) != shape for name, shape in found.items())):
            raise UserError("the reply holds tensors of other names or shapes than the arm's", where=where)
        for name, tensor in (reply.summed | reply.seen).items():
            if not is_finite(tensor):
                raise UserError(f"tensor {name!r} holds NaN or infinite values", where=where)
        if not all(math.isfinite(value) for value in reply.summed_facts.values()):
            raise UserError("a number is NaN or infinite", where=where)
        if not reply.summed_facts.get("weight", 1.0) > 0:
            raise UserError(f"a weight is above 0, got {reply.summed_facts['weight']}", where=where)
        if self.largest_update is None or self.hiding is not None:
            return
        model = strategy.revealed(task, reply)
        # written so that NaN is too large
        if model is not None and not (norm := change(model, task.tensors)) <= self.largest_update * (1 + ROUNDING):
            raise UserError(
                f"its change has the norm {norm:.4g}, and train.largest_update is {self.largest_update:g}", where=where
            )

    def _miss(self, name: str, round: int, *, came: bool) -> None:
        self._missed[name] = self._missed.get(name, 0) + 1
        if not came:
            self.emit(Warned(message=f"client {name!r} did not answer in round {round}, which goes on without it"))
        if self._missed[name] == SUSPENDED:
            self.emit(Warned(message=f"client {name!r} is not asked any more: it failed {SUSPENDED} rounds in a row"))


def _room(layout: Layout) -> int:
    """Bytes of a reply with these tensors, in double precision at most."""
    return FACTS + sum(8 * shape.numel() for shape in layout.values())
