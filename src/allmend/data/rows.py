"""Rows of a data set into records: which fields they have, and what is wrong with them.

One layout holds for all rows of a set: a prompt and its response, a conversation, or running text. Nothing is guessed
or repaired: the first fault is reported with its place, how many more rows have it, and what to do about it.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from allmend.data.records import Message, Record
from allmend.errors import UserError
from allmend.recipe import Fields

Row = dict[str, Any]
Layout = Literal["question", "conversation", "text"]

ROLES = ("system", "user", "assistant")
TRAIN_SPLITS = frozenset({"train", "training"})
HELD_OUT_SPLITS = frozenset({"test", "held_out", "held-out", "validation", "valid", "val", "dev", "eval"})

_SYNONYMS = {
    "prompt": ("question", "instruction", "input", "query", "context", "source"),
    "response": ("answer", "output", "completion", "reply", "target", "label"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "turns", "chat"),
    "text": ("content", "body", "document", "note", "passage"),
}
"""Names under which other data sets keep the same thing, for the suggestion in an error."""


class FaultError(Exception):
    """What is wrong with one row; `kind` groups rows that have the same fault."""

    def __init__(self, kind: str, what: str, hint: str) -> None:
        super().__init__(what)
        self.kind, self.what, self.hint = kind, what, hint


class Faults:
    """The faults of one source, kept until its end so that the first can be reported with how many are like it.

    Args:
        source: the data set as the user names it.
        unit: `line` or `row`, what positions in the source are called.
    """

    def __init__(self, source: str, unit: str) -> None:
        self.source, self.unit = source, unit
        self._first: dict[str, tuple[int, FaultError]] = {}
        self._count: dict[str, int] = {}

    def place(self, number: int) -> str:
        return f"{self.source}:{number}" if self.unit == "line" else f"{self.source}, row {number}"

    def note(self, number: int, fault: FaultError, *, count: int = 1) -> None:
        self._first.setdefault(fault.kind, (number, fault))
        self._count[fault.kind] = self._count.get(fault.kind, 0) + count

    def raise_first(self) -> None:
        """Raise the fault that stands first in the source, if there is any."""
        if not self._first:
            return
        # bytes that are not text may have caused any other fault
        number, fault = min(
            self._first.values(), key=lambda first: (first[1].kind not in ("encoding", "nul"), first[0])
        )
        total = self._count[fault.kind]
        more = f" ({total} {self.unit}s in all have this fault)" if total > 1 else ""
        raise UserError(fault.what + more, where=self.place(number), hint=fault.hint)


def to_records(rows: Iterable[tuple[int, Row]], fields: Fields, faults: Faults) -> tuple[list[Record], dict[str, int]]:
    """The records in numbered rows, in order, and the counts of what was left out (see `files.read_records`).

    Raises:
        UserError: something is wrong with a row, or there is none.
    """
    layout: Layout | None = None
    records: list[Record] = []
    seen: dict[str, tuple[int, int]] = {}  # id → (line, index in records)
    duplicates = 0
    for number, row in rows:
        if layout is None:
            layout = _layout(row, fields)
        if layout is None:
            faults.raise_first()
            raise _unknown_fields(row, fields, faults.place(number))
        try:
            record = _record(row, layout, fields)
        except FaultError as fault:
            faults.note(number, fault)
            continue
        if record.id not in seen:
            seen[record.id] = (number, len(records))
            records.append(record)
            continue
        first, index = seen[record.id]
        if _absent(row, fields.id) or records[index] == record:
            duplicates += 1
        else:
            what = f"the id {record.id!r} stands on {faults.unit} {first} already, with other content"
            hint = 'Give every record an id of its own, or set id = "" in [data.fields] to go by their content.'
            faults.note(number, FaultError("id", what, hint))
    faults.raise_first()
    if not records:
        raise UserError("holds no record", where=faults.source, hint="Put at least one record in it.")
    return records, {"duplicate records": duplicates} if duplicates else {}


def _layout(row: Row, fields: Fields) -> Layout | None:
    if fields.prompt in row and (fields.response in row or {fields.choices, fields.answer} <= row.keys()):
        return "question"
    if fields.messages in row:
        return "conversation"
    return "text" if fields.text in row else None


def _unknown_fields(row: Row, fields: Fields, where: str) -> UserError:
    wanted = ("prompt", "response") if fields.prompt in row or fields.response in row else tuple(_SYNONYMS)
    names = list(row)
    lower = {name.lower(): name for name in names}
    found = {}
    for part in wanted:
        if getattr(fields, part) in row:
            continue
        near = difflib.get_close_matches(part, lower, n=1, cutoff=0.75)
        name = next((lower[n] for n in (*near, *_SYNONYMS[part]) if n in lower), None)
        if name is not None:
            found[part] = name
    hint = "Rename the fields, or say in the recipe's [data.fields] which holds what"
    if found:
        hint += ", perhaps: " + ", ".join(f'{part} = "{name}"' for part, name in found.items())
    return UserError(
        f"has neither {fields.prompt!r} with {fields.response!r}, nor {fields.messages!r}, nor {fields.text!r}; "
        f"its fields are: {', '.join(map(repr, names)) or 'none'}",
        where=where,
        hint=hint + ".",
    )


def _record(row: Row, layout: Layout, fields: Fields) -> Record:
    """The record in one row; `FaultError` says why there is none."""
    messages: tuple[Message, ...] = ()
    text = ""
    choices: tuple[str, ...] = ()
    answer: int | None = None
    if layout == "text":
        text = _string(row, fields.text)
    else:
        choices = _choices(row, fields.choices)
        if layout == "conversation":
            messages = _conversation(row, fields.messages)
            response = messages[-1].content
        else:
            # where `answer` is the response's own field, its index or text is the answer to the choices
            given = not choices or (fields.response != fields.answer and not _absent(row, fields.response))
            response = _string(row, fields.response) if given else ""
        if choices:
            answer = _answer(row, choices, fields.answer, response)
            response = choices[answer]
        if layout == "question":
            messages = (Message("user", _string(row, fields.prompt)), Message("assistant", response))
    return Record(
        id=_id(row, fields.id, (messages, text, choices)),
        messages=messages,
        text=text,
        choices=choices,
        answer=answer,
        kind="" if _absent(row, fields.kind) else str(row[fields.kind]),
        held_out=_held_out(row, fields.split),
    )


def _absent(row: Row, name: str) -> bool:
    return row.get(name) is None or row[name] == ""


def named(value: object) -> str:
    """What a JSON value is, in words."""
    words = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else words.get(type(value), "a string" if isinstance(value, str) else "no text")


def _checked(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise FaultError(f"{name} type", f"{name!r} is {named(value)}, not text", "Write it as a string.")
    if not value.strip():
        raise FaultError(f"{name} empty", f"{name!r} is empty", "Fill it in or remove the record.")
    if "\0" in value:
        raise FaultError(f"{name} nul", f"{name!r} holds a NUL character (\\u0000)", "Remove it from the text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        what = f"{name!r} holds half a character (a lone surrogate such as \\ud83d)"
        raise FaultError(f"{name} surrogate", what, "The text was cut inside a character: export it again.") from None
    return value


def _string(row: Row, name: str) -> str:
    if name not in row:
        what = f"has no field {name!r}; its fields are: {', '.join(map(repr, row)) or 'none'}"
        raise FaultError(f"{name} missing", what, "Every record of a file needs the same fields; see [data.fields].")
    return _checked(row[name], name)


def _conversation(row: Row, name: str) -> tuple[Message, ...]:
    turns = row.get(name)
    hint = "Write a list of objects with `role` (system, user or assistant) and `content`."
    if isinstance(turns, str):  # CSV has no lists
        try:
            turns = json.loads(turns)
        except ValueError:
            raise FaultError("messages", f"{name!r} is not valid JSON", hint) from None
    if not isinstance(turns, list) or not turns:
        what = f"{name!r} is {'an empty list' if turns == [] else named(turns)}, not a list of turns"
        raise FaultError("messages", what, hint)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise FaultError("turn", f"turn {number} of {name!r} has no `role` and `content`", hint)
        if turn["role"] not in ROLES:
            raise FaultError("role", f"turn {number} of {name!r} has the unknown role {turn['role']!r}", hint)
        messages.append(Message(turn["role"], _checked(turn["content"], "content")))
    if messages[-1].role != "assistant":
        what = f"the last turn of {name!r} is the {messages[-1].role}'s, not the assistant's"
        raise FaultError("last turn", what, "End each conversation with the answer to learn, or remove it.")
    return tuple(messages)


def _choices(row: Row, name: str) -> tuple[str, ...]:
    if _absent(row, name) or row[name] == []:
        return ()
    value = row[name]
    options = value.split("|") if isinstance(value, str) else value
    hint = "Write a list of two or more different strings (in CSV: one string with | between them)."
    if not isinstance(options, list):
        raise FaultError("choices", f"{name!r} is {named(value)}, not a list", hint)
    choices = tuple(_checked(option, name).strip() for option in options)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise FaultError("choices", f"{name!r} holds too few options, or one of them twice: {options}", hint)
    return choices


def _answer(row: Row, choices: tuple[str, ...], name: str, response: str) -> int:
    """The index of the right choice, from the answer's text or index, or from the response where there is no answer."""
    hint = f"Give the right option's text, or its index from 0 to {len(choices) - 1}."
    value = response if _absent(row, name) else row[name]
    if isinstance(value, str):
        value = value.strip()
    index: object = value
    if value in choices:
        index = choices.index(value)
    elif re.fullmatch(r"[0-9]{1,4}(\.0)?", str(value)):  # a column of integers with gaps becomes one of floats
        index = int(float(value))
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        what = (
            f"{name!r} is {value!r}, which is none of the {len(choices)} choices" if value else f"{name!r} is missing"
        )
        raise FaultError("answer", what, hint)
    if response and response.strip() != choices[index]:
        what = f"the response is {response!r}, but {name!r} says {choices[index]!r}"
        raise FaultError("answer and response", what, "Make them agree, or leave one of them out.")
    return index


def _id(row: Row, name: str, content: tuple[tuple[Message, ...], str, tuple[str, ...]]) -> str:
    if _absent(row, name):
        messages, text, choices = content
        canonical = json.dumps([[[m.role, m.content] for m in messages], text, choices])
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _checked(value, name)


def _held_out(row: Row, name: str) -> bool | None:
    if _absent(row, name):
        return None
    value = str(row[name]).strip().lower()
    if value in TRAIN_SPLITS:
        return False
    if value in HELD_OUT_SPLITS:
        return True
    raise FaultError(
        "split",
        f"{name!r} is {row[name]!r}, which is neither training nor held-out data",
        f"Use 'train' or 'test' (or another of {', '.join(sorted(HELD_OUT_SPLITS))}), or set split = \"\" in "
        "[data.fields] to leave the split to allmend.",
    )
