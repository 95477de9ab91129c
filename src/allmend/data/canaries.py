"""Canaries: synthetic secrets, some planted in training data, the others kept out of it as controls.

A canary is a made-up text whose names, dates and numbers each have a known entropy. A fair coin of its own decides
whether it is inserted. If not, it is a control: what a model says about controls is what it says without having seen
them. One-run auditing (Steinke, Nasr, Jagielski, NeurIPS 2023) needs the coins independent, so inserted canaries and
controls are not balanced. What the texts look like is in `canary_kinds`; how canaries are probed is not known here.
"""

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any

from allmend.data.canary_kinds import KINDS
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.run import write_atomic

LARGE_BITS = 20.0
"""A secret of so many bits does not stand in another text by chance."""

UNSHARED_BITS = 15.0
"""No two canaries share a secret of so many bits: names and numbers."""


@dataclass(frozen=True, slots=True)
class SecretSpan:
    """A secret in a canary's text.

    Attributes:
        start, end: its place in characters, `text[start:end]`.
        slot: what it is (`name`, `record` …).
        bits: log2 of the number of values that the generator draws from.
    """

    start: int
    end: int
    slot: str
    bits: float


@dataclass(frozen=True, slots=True)
class Canary:
    """A synthetic text with secrets.

    Attributes:
        id: unique in its plan; says nothing about whether the canary is inserted.
        kind: the sort of text, one of `KINDS` unless it was made elsewhere.
        client: the client whose data it is planted in, or would have been.
        copies: how often it stands there, or would have stood.
        text: the whole text.
        secret_spans: its secrets, in the order of the text, none overlapping another.
        inserted: False for a control, which stands in nobody's data.
    """

    id: str
    kind: str
    client: str
    copies: int
    text: str
    secret_spans: tuple[SecretSpan, ...]
    inserted: bool


def plant(
    *,
    clients: Sequence[str],
    copies: Sequence[int],
    per_cell: int | Mapping[int, int],
    seed: int,
    kinds: Sequence[str] = ("clinical-note",),
    avoid: Iterable[str] = (),
) -> list[Canary]:
    """Canaries for every kind, client and number of copies, and for each a coin that decides whether it is inserted.

    No two canaries of a plan share a name or a number. A canary depends on the seed, its own cell and its place there,
    so that another client or cell leaves the others as they are, but where two would have shared a secret.

    Args:
        clients: names of the clients to plant in.
        copies: how often a canary stands in its client's data, one cell each.
        per_cell: canaries in each cell, controls included, or canaries by number of copies.
        seed: decides the secrets and the coins.
        kinds: what sorts of text, of `KINDS`.
        avoid: texts that will be trained on; a canary with a secret of 20 bits or more that stands in one is redrawn.

    Raises:
        UserError: an unknown kind, a repeated kind, client or number of copies, less than one copy, a negative number
            of canaries, none for some number of copies, or more canaries than there are names.
    """
    numbers = _checked_plan(kinds, clients, copies, per_cell)
    cells = [
        (kind, client, count, f"{kind}/{client}/{count}x/{index:03d}")
        for kind, client, count in product(kinds, clients, copies)
        for index in range(numbers[count])
    ]
    texts = list(avoid)
    forbidden: set[str] = set()
    while True:
        taken = set(forbidden)
        canaries = []
        for kind, client, count, id in cells:
            # seeding with a string goes through SHA-512, which is the same everywhere
            text, spans = _draw(kind, random.Random(f"{seed}/{id}"), taken)
            # the coin has a source of its own, so that it cannot depend on what the texts say
            inserted = random.Random(f"{seed}/coin/{id}").random() < 0.5
            canaries.append(Canary(id, kind, client, count, text, spans, inserted))
        found = _standing({secret for canary in canaries for secret in _large(canary)}, texts)
        if not found:
            return canaries
        forbidden |= found


def _checked_plan(
    kinds: Sequence[str], clients: Sequence[str], copies: Sequence[int], per_cell: int | Mapping[int, int]
) -> dict[int, int]:
    """The number of canaries in a cell for each number of copies."""
    where = "canaries"
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        hint = f"Kinds: {', '.join(KINDS)}."
        raise UserError(f"there is no kind of canary {', '.join(map(repr, unknown))}", where=where, hint=hint)
    for name, values in (("kinds", kinds), ("clients", clients), ("copies", copies)):
        if len(set(values)) < len(values):
            raise UserError(f"{name} {list(values)} must not repeat", where=where, hint="Name each once.")
    if any(count < 1 for count in copies):
        raise UserError(
            f"copies {list(copies)} must be 1 or more", where=where, hint="Controls are made without asking for them."
        )
    numbers = per_cell if isinstance(per_cell, Mapping) else dict.fromkeys(copies, per_cell)
    missing = [count for count in copies if count not in numbers]
    if missing or any(numbers[count] < 0 for count in copies):
        raise UserError(
            f"no usable number of canaries for {missing or list(copies)} copies: {per_cell}",
            where=where,
            hint="Give one number of 0 or more for all, or one for each number of copies.",
        )
    total = len(kinds) * len(clients) * sum(numbers[count] for count in copies)
    sizes = [slot.size for kind in kinds for slot in KINDS[kind].slots.values() if slot.bits >= UNSHARED_BITS]
    if total > (most := min(sizes, default=0) // 10):
        # a text takes up to two names; far below exhaustion a redraw is rare and the stated entropy holds
        raise UserError(
            f"{total:,} canaries are too many for the names there are",
            where=where,
            hint=f"Plant at most {most:,}, controls included.",
        )
    return {count: numbers[count] for count in copies}


def _draw(kind: str, generator: random.Random, taken: set[str]) -> tuple[str, tuple[SecretSpan, ...]]:
    """A text whose names and numbers are not in `taken`, to which they are then added."""
    templates, slots = KINDS[kind].templates, KINDS[kind].slots
    template = templates[int(generator.random() * len(templates))]
    unshared = [name for name, slot in slots.items() if slot.bits >= UNSHARED_BITS]
    while True:
        values = {name: slot.draw(generator) for name, slot in slots.items()}
        own = {values[name] for name in unshared}
        if len(own) == len(unshared) and own.isdisjoint(taken):
            break
    taken |= own
    text = ""
    spans = []
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is not None:
            start = len(text)
            text += values[name]
            spans.append(SecretSpan(start, len(text), name, slots[name].bits))
    return text, tuple(spans)


def _large(canary: Canary) -> list[str]:
    return [canary.text[span.start : span.end] for span in canary.secret_spans if span.bits >= LARGE_BITS]


def _standing(strings: Collection[str], texts: Iterable[str]) -> set[str]:
    """Those of `strings` that stand in one of `texts`, also within a longer word or number.

    A search for each string would read the texts as many times as there are strings. Instead, they are read once for
    each length up to 16, by a regular expression that allows at each place any character that some string has there.
    Most of what it finds are strings, or their first 16 characters: secrets of a slot are made of the same characters.
    """
    whole = "\0".join(texts)
    heads: dict[int, set[str]] = defaultdict(set)
    for string in strings:
        heads[min(len(string), 16)].add(string[:16])
    found: set[str] = set()
    for group in heads.values():
        characters = (re.escape("".join(sorted(set(column)))) for column in zip(*group, strict=True))
        candidates = re.finditer(f"(?=({''.join(f'[{some}]' for some in characters)}))", whole)
        found |= {candidate[1] for candidate in candidates if candidate[1] in group}
    return {string for string in strings if string[:16] in found and string in whole}


def to_records(canaries: Iterable[Canary]) -> list[Record]:
    """What goes into the clients' training data: each inserted canary as often as its `copies` say."""
    return [
        Record(f"canary:{canary.id}#{copy}", text=canary.text, kind="canary", held_out=False)
        for canary in canaries
        if canary.inserted
        for copy in range(canary.copies)
    ]


def canary_of(record: str) -> str | None:
    """The id of the canary whose copy a record is, by the record's id; None for other records."""
    return record.removeprefix("canary:").rpartition("#")[0] if record.startswith("canary:") else None


def write_canaries(path: Path, canaries: Iterable[Canary]) -> None:
    """Write canaries and controls as JSON Lines, the whole file or nothing."""
    lines = (json.dumps(asdict(canary), ensure_ascii=False) + "\n" for canary in canaries)
    write_atomic(path, "".join(lines).encode())


def read_canaries(path: Path) -> list[Canary]:
    """The canaries in a file that `write_canaries` has written.

    Raises:
        UserError: the file is missing, empty or damaged: a malformed line, spans outside their text, out of order or
            overlapping, an id that stands twice, a secret that the canary's kind does not have. A kind that is not
            in `KINDS` may have any secrets.
    """
    hint = "Name the canaries.jsonl of the run that planted them."
    try:
        with path.open(encoding="utf-8", newline="\n") as file:  # a text may hold what else ends lines
            lines = list(file)
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", where=path, hint=hint) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, hint=hint) from None
    canaries: dict[str, Canary] = {}
    for number, line in enumerate(lines, start=1):
        try:
            canary = _canary(json.loads(line))
        except ValueError as error:  # includes JSON's
            raise UserError(f"is no canary: {error}", where=f"{path}:{number}", hint=hint) from None
        if canary.id in canaries:
            raise UserError(f"the canary {canary.id!r} stands twice", where=f"{path}:{number}", hint=hint)
        canaries[canary.id] = canary
    if not canaries:
        raise UserError("holds no canary", where=path, hint=hint)
    return list(canaries.values())


def _canary(row: Any) -> Canary:
    """The canary in a parsed line; ValueError says why there is none."""
    types = {"id": str, "kind": str, "client": str, "copies": int, "text": str, "secret_spans": list, "inserted": bool}
    _check_types(row, types)
    if row["copies"] < 1:
        raise ValueError(f"'copies' is {row['copies']}, not 1 or more")
    if not row["text"]:
        raise ValueError("'text' is empty")
    spans: list[SecretSpan] = []
    for fields in row["secret_spans"]:
        _check_types(fields, {"start": int, "end": int, "slot": str, "bits": (float, int)})
        span = SecretSpan(**{**fields, "bits": float(fields["bits"])})
        where = f"the secret span {span.start}–{span.end}"
        if not 0 <= span.start < span.end <= len(row["text"]):
            raise ValueError(f"{where} lies outside the text of {len(row['text'])} characters")
        if spans and span.start < spans[-1].end:
            raise ValueError(f"{where} begins before the one ahead of it ends, at {spans[-1].end}")
        if not 0 <= span.bits < math.inf:
            raise ValueError(f"{where} has {span.bits} bits, not a number of 0 or more")
        _check_slot(row["kind"], span)
        spans.append(span)
    return Canary(**{**row, "secret_spans": tuple(spans)})


def _check_slot(kind: str, span: SecretSpan) -> None:
    """A canary of a kind that is known here must have its secrets, else their exposure would be a wrong figure."""
    if kind not in KINDS:
        return
    slot = KINDS[kind].slots.get(span.slot)
    if slot is None or not math.isclose(slot.bits, span.bits):
        known = f"one of {slot.bits:.2f}" if slot else "none"
        raise ValueError(
            f"it has a secret {span.slot!r} of {span.bits:.2f} bits, and the kind {kind!r} has {known}; "
            "texts of another generator must be of a kind of another name"
        )


def _check_types(row: Any, types: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(row, dict) or row.keys() != types.keys():
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"it must have the fields {', '.join(types)}, not {found}")
    for name, type_ in types.items():
        allowed = type_ if isinstance(type_, tuple) else (type_,)
        if type(row[name]) not in allowed:  # a bool is no number
            raise ValueError(f"{name!r} is {row[name]!r}, not of type {allowed[0].__name__}")
