"""Secure aggregation between machines: the four steps of a secure sum as questions to members.

What both sides agree on beforehand is in the recipe and in the offer: the members' public keys, how many must stay, how
values become integers. A member checks the terms of every sum against these, and never lets one vector be opened twice:
the difference of two sums would be somebody's part.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from allmend.errors import UserError
from allmend.federation.engines.flower.exchange import FACTS, Exchange
from allmend.federation.engines.wire import dump_reply, error_of
from allmend.federation.privacy.secure_sum import ProtocolError, SecureMember, SecureSum, Terms
from allmend.federation.privacy.vectors import VectorCode
from allmend.learn.noise import NoiseSource
from allmend.models.tensors import JSON, dump, parse
from allmend.recipe import SecureAggregation
from allmend.run import write_atomic
from allmend.strategy import Reply, Sums, Turn

STEPS = ("keys", "shares", "masked", "opened")


@dataclass(frozen=True)
class Hiding:
    """What a run's members and coordinator agree on about an arm's sums.

    Attributes:
        run: digest of the offer.
        arm: name.
        keys: all members' raw public keys, by name.
        codes: how the replies of each leg become vectors.
        layer: of the recipe.
    """

    run: str
    arm: str
    keys: Mapping[str, bytes]
    codes: Sequence[VectorCode]
    layer: SecureAggregation

    def terms(self, session: str, names: list[str], leg: int) -> Terms:
        """The terms of one sum.

        Raises:
            ValueError: too few members, or one that is not registered.
        """
        if strangers := sorted(set(names) - set(self.keys)):
            raise ValueError(f"{', '.join(strangers)} is not registered")
        code = self.codes[leg]
        plain = Terms(
            session=session,
            members={name: self.keys[name] for name in names},
            length=code.length,
            bits=code.bits,
            fewest=self.layer.fewest,
        )
        needed = max(plain.lowest_threshold, math.ceil(self.layer.threshold * (plain.degree + 1)))
        return Terms(
            session=session,
            members=plain.members,
            length=plain.length,
            bits=plain.bits,
            threshold=needed,
            fewest=plain.fewest,
        )

    def session(self, turn: Turn, task: str, once: str) -> str:
        """The name of one try at a sum of what members have made of the task with this digest.

        A member that was given another task is in another sum: the coordinator cannot tell its part by what it asked.
        """
        return f"{self.run}/{self.arm}/{turn.round}/{turn.leg}/{task}/{once}"


def ask_sum(
    exchange: Exchange,
    hiding: Hiding,
    turn: Turn,
    task: str,
    names: list[str],
    *,
    seconds: float,
    warn: Callable[[str], None],
    opening: Callable[[list[str]], None] = lambda survivors: None,
    silent: Callable[[str], None] = lambda name: None,
) -> tuple[Sums, list[str]]:
    """Have members form the sum of what they have worked out; gives it, and who is in it.

    Args:
        exchange: carries the questions.
        hiding: what is agreed on.
        turn: the round and leg.
        task: digest of the task that they had, the same for all.
        names: members that have worked.
        seconds: that each step may take.
        warn: told of members that are lost on the way.
        opening: told who is in the sum, before anybody is asked to open it.
        silent: told of members that did not answer in time.

    Raises:
        UserError: too few are left; a `ProtocolError` where they were lost on the way.
    """
    once = secrets.token_hex(8)
    try:
        terms = hiding.terms(hiding.session(turn, task, once), names, turn.leg)
    except ValueError as error:
        raise UserError(f"no sum can be formed: {error}", where=f"arm {hiding.arm!r}, round {turn.round}") from None
    total, told = SecureSum(terms), dict.fromkeys(names, b"")
    code = hiding.codes[turn.leg]
    largest = FACTS + code.nbytes
    for step in STEPS:
        about: dict[str, JSON] = {
            "ask": "secure",
            "run": hiding.run,
            "arm": hiding.arm,
            "round": turn.round,
            "leg": turn.leg,
            "once": once,
            "names": names,
            "step": step,
        }
        if step == "opened":
            opening(total.survivors)
        questions = {name: dump(_packed(message), about) for name, message in told.items()}
        for name, data in exchange.ask(questions, seconds=seconds, largest=largest):
            try:
                if data is None:
                    silent(name)
                    raise ProtocolError(f"no answer to {step!r}", where=f"member {name!r}")
                tensors, found = parse(data, where=f"member {name!r}")
                if (refused := error_of(found)) is not None:
                    raise ProtocolError(refused, where=f"member {name!r}")
                total.receive(name, _unpacked(tensors))
            except UserError as error:
                warn(f"lost on the way to a sum: {error}")
        told = total.advance()
    assert total.total is not None
    return code.decode(total.total, len(total.survivors)), total.survivors


def _packed(message: bytes) -> dict[str, torch.Tensor]:
    return {"message": torch.frombuffer(bytearray(message), dtype=torch.uint8)} if message else {}


def _unpacked(tensors: Mapping[str, torch.Tensor]) -> bytes:
    message = tensors.get("message")
    if message is None:
        return b""
    if message.dtype != torch.uint8 or message.dim() != 1:
        raise UserError("the message of a secure sum must be bytes")
    return message.numpy().tobytes()


@dataclass
class HiddenPart:
    """A member's part in the sums of one arm.

    Attributes:
        name: the member's.
        identity: its private key.
        hiding: what is agreed on.
        folder: of the run at the member, where it keeps over whom its vectors have been opened.
        work: what it worked out in a leg, and the digest of the task, from its own disk.
        source: random numbers for the rounding and the noise of a leg, the same whenever it is asked for.
    """

    name: str
    identity: Ed25519PrivateKey
    hiding: Hiding
    folder: Path
    work: Callable[[int, int], tuple[Reply, str]]
    source: Callable[[Turn], NoiseSource]
    _at: tuple[str, SecureMember, str] | None = field(init=False, default=None)

    def answer(self, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
        """One step.

        Raises:
            UserError: the step or the terms are not what was agreed on, or this vector was opened before.
        """
        where = f"member {self.name!r}"
        try:
            round, leg, once, step = (about[key] for key in ("round", "leg", "once", "step"))
            names = [str(name) for name in about["names"]]
            turn = Turn(int(round), int(leg), int(round))
            if step not in STEPS or not isinstance(once, str) or len(once) > 64:
                raise ValueError("unknown step")
            if not 0 <= turn.leg < len(self.hiding.codes):
                raise ValueError(f"the arm has {len(self.hiding.codes)} legs")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a step of a secure sum: {error}", where=where) from None
        reply, task = self.work(turn.round, turn.leg)
        # numbers alone may well come again, in another turn
        of_turn: dict[str, JSON] = {} if reply.summed else {"turn": [turn.round, turn.leg]}
        content = hashlib.sha256(dump_reply(reply, about=of_turn)).hexdigest()
        session, message = self.hiding.session(turn, task, once), _unpacked(tensors)
        self._refuse_other_work(turn, content)
        try:
            if step == "keys":
                terms = self.hiding.terms(session, names, turn.leg)
                self._at = session, SecureMember(terms, self.name, self.identity), content
                answer = self._at[1].keys()
            elif self._at is None or (self._at[0], self._at[2]) != (session, content):
                raise UserError("this member is not in that sum: it may have begun anew", where=where)
            elif step == "shares":
                answer = self._at[1].shares(message)
            elif step == "masked":
                vector, _ = self.hiding.codes[turn.leg].encode(reply, self.source(turn))
                answer = self._at[1].masked(message, vector)
            else:
                answer = self._at[1].opened(message)
                self._note(turn, content, self._at[1].survivors)  # before it is sent
        except ValueError as error:
            raise UserError(str(error), where=where) from None
        return dump(_packed(answer), {})

    @property
    def _opened(self) -> Path:
        return self.folder / "opened.json"

    def _refuse_other_work(self, turn: Turn, content: str) -> None:
        """Refuse to mask, for a turn whose sum was opened, anything else than what is in that sum.

        The difference of both sums would be what changed in this member's part alone.
        """
        if any(self._is(other, turn) and other["content"] != content for other in self._read()):
            raise self._opened_before(turn)

    def _note(self, turn: Turn, content: str, survivors: list[str]) -> None:
        """Keep in mind what is opened over whom: neither this turn nor what it holds is opened otherwise again.

        The difference of two sums would be somebody's part. The same sum once more tells nothing new. Arms that begin
        alike have the same content in one turn each, which is opened over the same members too.
        """
        opened = {"arm": self.hiding.arm, "turn": [turn.round, turn.leg], "content": content, "survivors": survivors}
        before = self._read()
        if opened in before:
            return
        for other in before:
            again = other["content"] == content and (other["survivors"] != survivors or other["arm"] == self.hiding.arm)
            if again or self._is(other, turn):
                raise self._opened_before(turn)
        write_atomic(self._opened, json.dumps([*before, opened]).encode())

    def _is(self, opened: Mapping[str, Any], turn: Turn) -> bool:
        return (opened["arm"], opened["turn"]) == (self.hiding.arm, [turn.round, turn.leg])

    def _opened_before(self, turn: Turn) -> UserError:
        return UserError(
            f"what this member worked out in round {turn.round} is in a sum that was opened already, and a second sum "
            "over others, or of other work, would bare somebody's part",
            where=f"member {self.name!r}",
        )

    def _read(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads(self._opened.read_bytes())) if self._opened.exists() else []
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read: {error}", where=self._opened) from error
