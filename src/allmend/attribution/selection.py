"""Data that influence chose, and as much that chance chose, for an honest comparison of the two."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmend.attribution.subject import client_name
from allmend.data.files import read_records
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.influence.table import ROWS, read_scores
from allmend.recipe import Fields
from allmend.run import write_atomic


@dataclass(frozen=True)
class Selected:
    """How much was kept.

    Attributes:
        client: whose.
        kept, records: of so many.
        chosen, by_chance: the files.
    """

    client: str
    kept: int
    records: int
    chosen: Path
    by_chance: Path


def select(
    scores: Path | str,
    *,
    train: Sequence[Path | str],
    keep: float,
    out: Path | str,
    target: str | None = None,
    per_client: bool = False,
    balance: str = "",
    fields: Fields | None = None,
    seed: int = 0,
) -> list[Selected]:
    """Write the most helpful records of each client to `OUT/chosen/`, and as many random ones to `OUT/random/`.

    Args:
        scores: a folder that `allmend attribute --out` has written.
        train: the files that were scored.
        keep: share of all records.
        out: where to.
        target: whose scores count; the only target when None.
        per_client: whether the share is of each client's records, not of all together.
        balance: a field of the records, of whose every value the share is kept.
        fields: the names under which the files keep each part of a record.
        seed: of chance.

    Raises:
        UserError: a file cannot be read, has records without a score, or nothing would be kept.
    """
    if not 0 < keep < 1:
        raise UserError(f"a share to keep lies between 0 and 1, got {keep}", where="keep")
    fields = fields or Fields()
    fields = fields.model_copy(update={"kind": balance}) if balance else fields
    rows = read_scores(Path(scores) / ROWS)
    names = sorted({row.target for row in rows})
    if target is None and len(names) > 1:
        raise UserError(f"there are scores for {len(names)} targets", where="target", hint=f"Name one: {names[0]} …")
    name = target or names[0]
    # a record without a token to learn from helps nothing: it comes after all others
    score = {
        (row.client, row.record_id): -math.inf if row.score is None else row.score for row in rows if row.target == name
    }
    if not score:
        raise UserError(f"there is no target {name!r}", where="target", hint=f"There are {', '.join(names)}.")
    clients = {client_name(Path(path), train): read_records(str(path), fields=fields)[0] for path in train}
    everyone = [(client, record) for client, records in clients.items() for record in records]
    if missing := [record.id for client, record in everyone if (client, record.id) not in score]:
        raise UserError(
            f"{len(missing)} records have no score, the first of them {missing[0]!r}",
            where=scores,
            hint="Name the files that were scored.",
        )
    if balance and not any(record.kind for _, record in everyone):
        raise UserError(
            f"no record has the field {balance!r}", where="balance", hint="Name a field of the training records."
        )
    groups: dict[tuple[str, str], list[tuple[str, Record]]] = {}
    for client, record in everyone:
        key = (client if per_client else "", record.kind if balance else "")
        groups.setdefault(key, []).append((client, record))
    kept: set[tuple[str, str]] = set()
    for some in groups.values():
        best = sorted(some, key=lambda one: (-score[one[0], one[1].id], one[1].id))
        kept |= {(client, record.id) for client, record in best[: max(1, round(keep * len(some)))]}
    found: list[Selected] = []
    for (client, records), name in zip(clients.items(), _file_names(train), strict=True):
        chosen = [record for record in records if (client, record.id) in kept]
        by_chance = random.Random(f"{seed}/{client}").sample(records, len(chosen))
        paths = [Path(out) / kind / f"{name}.jsonl" for kind in ("chosen", "random")]
        for path, some_records in zip(paths, (chosen, by_chance), strict=True):
            write_atomic(
                path, "".join(json.dumps(_plain(one), ensure_ascii=False) + "\n" for one in some_records).encode()
            )
        found.append(Selected(client, len(chosen), len(records), *paths))
    return found


def _file_names(train: Sequence[Path | str]) -> list[str]:
    """A name for each file, without folders: those of a name that is taken are numbered."""
    names: list[str] = []
    for path in train:
        name = Path(path).name.partition(".")[0]
        numbered = (name, *(f"{name}-{number}" for number in range(2, len(train) + 2)))
        names.append(next(one for one in numbered if one not in names))
    return names


def _plain(record: Record) -> dict[str, Any]:
    """A record as a recipe's files have them by default."""
    made: dict[str, Any] = {"id": record.id}
    if record.messages:
        made["messages"] = [{"role": one.role, "content": one.content} for one in record.messages]
    else:
        made["text"] = record.text
    if record.choices:
        made = {"id": record.id, "prompt": record.messages[0].content, "choices": list(record.choices)}
        made["answer"] = record.answer
    if record.kind:
        made["kind"] = record.kind
    return made
