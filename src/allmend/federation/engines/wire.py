"""Tasks, replies and states as bytes, for engines whose members are not in this process."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allmend.errors import UserError
from allmend.models.tensors import JSON, dump, parse
from allmend.strategy import Facts, Reply, State, Task, Turn, grouped, of_group

Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
"""As large as a float64 holds exactly."""
Count = Annotated[int, Field(ge=0, le=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


M = TypeVar("M", bound=_Strict)


class _Turn(_Strict):
    round: Annotated[Count, Field(ge=1)]
    leg: Count
    rounds: Annotated[Count, Field(ge=1)]
    members: Count


class _Task(_Strict):
    turn: _Turn
    facts: dict[str, bool | Whole | Number | str]


class _Reply(_Strict):
    summed: dict[str, Whole | Number]
    seen: dict[str, bool | Whole | Number | str]


class _State(_Strict):
    state: dict[str, bool | Whole | Number | str]


def dump_task(task: Task, state: State | None = None, about: Mapping[str, JSON] = {}) -> bytes:
    """A task, a member's state where that travels too, and whatever else is to be said."""
    tensors = grouped("task", task.tensors)
    facts: dict[str, JSON] = {**about, "turn": asdict(task.turn), "facts": task.facts}
    if state is not None:
        tensors |= grouped("state", state.tensors)
        facts["state"] = state.facts
    return dump(tensors, facts)


def task_digest(task: Task) -> str:
    """SHA-256 of a task: what a member's work rests on."""
    return hashlib.sha256(dump_task(task)).hexdigest()


def error_of(about: Mapping[str, Any]) -> str | None:
    """What a message says of an error; None where it says nothing."""
    error = about.get("error")
    return str(error.get("what")) if isinstance(error, dict) else None


def parse_task(data: bytes, *, where: str = "task") -> tuple[Task, State, dict[str, Any]]:
    """What `dump_task` made bytes of; an empty state where none travelled.

    Raises:
        UserError: the bytes are no such thing.
    """
    tensors, facts = parse(data, where=where)
    found = _checked(_Task, facts, where)
    state = _checked(_State, facts, where).state if "state" in facts else Facts()
    task = Task(Turn(**found.turn.model_dump()), of_group("task", tensors), dict(found.facts))
    return task, State(of_group("state", tensors), dict(state)), facts


def dump_reply(reply: Reply, state: State | None = None, about: Mapping[str, JSON] = {}) -> bytes:
    """A reply, and the member's next state where that travels too."""
    tensors = grouped("summed", reply.summed) | grouped("seen", reply.seen)
    facts: dict[str, JSON] = {**about, "summed": reply.summed_facts, "seen": reply.seen_facts}
    if state is not None:
        tensors |= grouped("state", state.tensors)
        facts["state"] = state.facts
    return dump(tensors, facts)


def parse_reply(data: bytes, *, where: str = "reply") -> tuple[Reply, State, dict[str, Any]]:
    """What `dump_reply` made bytes of; an empty state where none travelled.

    Raises:
        UserError: the bytes are no such thing.
    """
    tensors, facts = parse(data, where=where)
    found = _checked(_Reply, facts, where)
    state = _checked(_State, facts, where).state if "state" in facts else Facts()
    reply = Reply(of_group("summed", tensors), dict(found.summed), of_group("seen", tensors), dict(found.seen))
    return reply, State(of_group("state", tensors), dict(state)), facts


def _checked(kind: type[M], facts: Mapping[str, Any], where: str) -> M:
    try:
        return kind.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"the message's {place} is not as it should be: {first['msg']}", where=where) from None
