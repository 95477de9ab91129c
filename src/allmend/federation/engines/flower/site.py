"""A member's site: answers the coordinator's questions with its own records, and keeps what it must on its own disk.

Questions carry tensors and facts, never code: which strategy, adapter and settings an arm has is in the recipe that
the member has agreed to. A question that comes twice gets the same bytes twice.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allmend.errors import UserError
from allmend.federation.engines.wire import dump_reply, parse_reply, parse_task, task_digest
from allmend.federation.member import Member, MemberClient, OnStep
from allmend.federation.privacy.ledger import NO_LEDGER, Ledger
from allmend.federation.privacy.vectors import without_sums
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors, dump, parse, read_tensors, write_tensors
from allmend.recipe import Train
from allmend.run import write_atomic
from allmend.strategy import Reply, State, Strategy, Turn


@dataclass(frozen=True)
class ArmAtMember:
    """What a member does in an arm.

    Attributes:
        strategy: the arm's.
        trainable: what learns, at its initial parameters.
        member: the member's records, with the arm's layers on them.
        settings: of local training.
        hides: whether what is summed stays here until it is asked for behind masks.
        ledger: of the guarantee for the member's records.
        rounds: that the arm has, as agreed on; None leaves it unchecked.
    """

    strategy: Strategy
    trainable: Trainable
    member: Member
    settings: Train
    hides: bool = False
    ledger: Ledger = NO_LEDGER
    rounds: int | None = None

    def check(self, turn: Turn) -> None:
        """Refuse a turn that the arm does not have.

        Raises:
            UserError: so it is.
        """
        rounds = self.rounds or turn.rounds
        if not (turn.leg < self.strategy.legs and turn.round <= rounds == turn.rounds):
            raise UserError(
                f"the arm has {rounds} rounds of {self.strategy.legs} legs, and no round {turn.round} of {turn.rounds} "
                f"with a leg {turn.leg}",
                where="the coordinator's question",
            )

    def check_frozen(self, digest: str) -> None:
        """Refuse to learn beside other frozen factors than the coordinator's: what is summed would belong to neither.

        Raises:
            UserError: they differ.
        """
        if digest != self.trainable.frozen_digest:
            raise UserError(
                "the factors that do not learn came out otherwise here than at the coordinator",
                where=f"member {self.member.name!r}",
                hint="They are drawn from the recipe's seed: install the coordinator's version of torch.",
            )


@dataclass
class Site:
    """One member in one run.

    Attributes:
        folder: where states and answers are kept.
        open_arm: makes an arm's things ready; left when another arm's are wanted.
        on_step: told of every optimiser step.
    """

    folder: Path
    open_arm: Callable[[str], contextlib.AbstractContextManager[ArmAtMember]]
    on_step: OnStep = lambda name, turn, step: None
    _open: contextlib.ExitStack = field(init=False, default_factory=contextlib.ExitStack)
    _arm: tuple[str, ArmAtMember, Tensors] | None = field(init=False, default=None)

    def answer(self, question: bytes) -> bytes:
        """Work on a task. What goes wrong with it is the answer then, so that the coordinator can say so."""
        try:
            task, _, about = parse_task(question, where="the coordinator's question")
            arm = str(about.get("arm"))
            digest = hashlib.sha256(question).hexdigest()
            place = _Place(self.folder / "arms" / _plain(arm), task.turn.round, task.turn.leg)
            name, at, initial = self._enter(arm)
            if (answer := place.answered(digest)) is not None:
                return self._sent(at, answer)
            at.check(task.turn)
            at.check_frozen(str(about.get("frozen", "")))
            before = place.state_before(*_counted(about))
            place.charge(at.member.name, at.ledger, digest)
            client = MemberClient(at.member, at.trainable, at.settings, initial, before, self.on_step)
            reply = at.strategy.work(task, client)
            if undeclared := at.strategy.declare().undeclared(reply):
                raise TypeError(f"strategy {at.strategy.name!r} returns what it did not declare: {undeclared}")
            answer = dump_reply(reply, about={"arm": name})
            place.keep(client.state, answer, digest, task_digest(task), *_counted(about))
        except UserError as error:
            return error_answer(error)
        return self._sent(at, answer)

    def work(self, arm: str, round: int, leg: int) -> tuple[Reply, str]:
        """What was worked out in a leg of a round, and the digest of the task.

        Raises:
            UserError: nothing was, or it is not kept any more.
        """
        place = _Place(self.folder / "arms" / _plain(arm), round, leg)
        return parse_reply(place.kept())[0], place.task()

    def _sent(self, at: ArmAtMember, answer: bytes) -> bytes:
        return dump_reply(without_sums(parse_reply(answer)[0])) if at.hides else answer

    def state(self, arm: str, about: Mapping[str, Any]) -> State:
        """The member's state after its last reply in an arm that counted, as a question tells; empty before."""
        place = _Place(self.folder / "arms" / _plain(arm), 2**31, 0)
        return place.state_before(*_counted(about))

    def close(self) -> None:
        """Let go of the model."""
        self._open.close()
        self._arm = None

    def _enter(self, arm: str) -> tuple[str, ArmAtMember, Tensors]:
        if self._arm is None or self._arm[0] != arm:
            self.close()
            at = self._open.enter_context(self.open_arm(arm))
            self._arm = arm, at, at.trainable.state()
        return self._arm


def _counted(about: Mapping[str, Any]) -> tuple[tuple[int, int] | None, ...]:
    """The turn of the member's last reply that counted, as a question tells; nothing where it does not tell."""
    if "counted" not in about:
        return ()
    match about["counted"]:
        case None:
            return (None,)
        case [int(round), int(leg)]:
            return ((round, leg),)
    raise UserError("the question's counted is no round and leg", where="the coordinator's question")


def error_answer(error: UserError) -> bytes:
    """What went wrong, as an answer."""
    return dump({}, {"error": {"what": error.what, "where": error.where, "hint": error.hint}})


LONGEST = 80
"""Letters of a name: those that a recipe's arm may have, and room for what is worked out about it."""


def _plain(arm: str) -> str:
    """A name that is safe as a folder's: it came over the network."""
    if (
        not arm
        or len(arm) > LONGEST
        or not all(letter.isalnum() or letter in "._-" for letter in arm)
        or arm[0] in ".-"
    ):
        raise UserError(f"no arm is called {arm!r}", where="the coordinator's question")
    return arm


@dataclass(frozen=True)
class _Place:
    """Where a member keeps what belongs to one leg of one round: its state afterwards, and its answer."""

    folder: Path
    round: int
    leg: int

    @property
    def key(self) -> tuple[int, int]:
        return self.round, self.leg

    def answered(self, digest: str) -> bytes | None:
        """The answer given before to the same question."""
        path = self._answer(self.key)
        try:
            data = path.read_bytes()
            _, about = parse(data, where=path)
            _, kept = read_tensors(self._state(self.key))
        except (OSError, UserError):
            return None
        return data if kept.get("question") == digest and not about.get("error") else None

    def kept(self) -> bytes:
        """The answer that is kept."""
        path = self._answer(self.key)
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"round {self.round} was not worked on here: {error.strerror}", where=path) from error

    def task(self) -> str:
        """The digest of the task that the answer is to."""
        return str(read_tensors(self._state(self.key))[1].get("task"))

    def state_before(self, *counted: tuple[int, int] | None) -> State:
        """The state after what came before.

        Args:
            counted: the round and leg of the member's last reply that counted, None where none did; when not given, the
                newest before this one.

        Raises:
            UserError: only later states are kept: the coordinator has gone further back than this member can.
        """
        keys = [key for key in self._keys() if not counted or (counted[0] is not None and key <= counted[0])]
        if counted and counted[0] is not None and counted[0] not in keys:
            raise UserError(
                f"what this member had worked out in round {counted[0][0]} is not here any more",
                where=self.folder,
                hint="Its folder was put back or changed: begin a new run.",
            )
        before = [key for key in keys if key < self.key]
        if not before:
            if keys and self.key != min(keys) and min(keys) > (1, 0):
                raise UserError(
                    f"round {self.round} lies before what this member has kept (from round {min(keys)[0]} on)",
                    where=self.folder,
                    hint="The coordinator was put back to an old checkpoint: begin a new run.",
                )
            return State()
        tensors, about = read_tensors(self._state(max(before)))
        return State(tensors, about["facts"])

    def charge(self, member: str, ledger: Ledger, digest: str) -> None:
        """Count a question that is about to be worked on against the budget of the member's records.

        Whoever asks decides how often, so the member counts: every other question costs a round's price, and the same
        one again where its noise is drawn anew.

        Raises:
            UserError: the budget does not cover it, or the count cannot be kept. Nothing was worked on then.
        """
        if not ledger.accounts:
            return
        path = self.folder / "charged.json"
        try:
            before = [str(one) for one in json.loads(path.read_bytes())] if path.exists() else []
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"the count of what was spent cannot be read: {error}", where=path) from error
        if digest in before and not ledger.anew:
            return
        planned = min(account.rounds for account in ledger.accounts.values())
        if len(before) >= planned or ledger.exhausted({member: len(before)}, len(before), [member]):
            raise UserError(
                f"the records' privacy budget does not cover another round: {len(before)} of {planned} were worked on",
                where=f"member {member!r}",
            )
        write_atomic(path, json.dumps([*before, digest]).encode())

    def keep(self, state: State, answer: bytes, digest: str, task: str, *counted: tuple[int, int] | None) -> None:
        """Keep the state and the answer, the answer first; drop what is older than what the round began with."""
        last = counted[0] if counted and counted[0] else self.key
        older = [key for key in self._keys() if key[0] < self.round and (not counted or key <= last)]
        write_atomic(self._answer(self.key), answer)
        write_tensors(self._state(self.key), state.tensors, {"facts": state.facts, "question": digest, "task": task})
        for key in sorted(older)[:-1]:
            self._answer(key).unlink(missing_ok=True)
            self._state(key).unlink(missing_ok=True)

    def _keys(self) -> list[tuple[int, int]]:
        found = []
        for path in self.folder.glob("*.state.safetensors"):
            with contextlib.suppress(ValueError):
                round, leg = path.name.removesuffix(".state.safetensors").split("-")
                found.append((int(round), int(leg)))
        return sorted(found)

    def _state(self, key: tuple[int, int]) -> Path:
        return self.folder / f"{key[0]:06d}-{key[1]}.state.safetensors"

    def _answer(self, key: tuple[int, int]) -> Path:
        return self.folder / f"{key[0]:06d}-{key[1]}.answer.safetensors"
