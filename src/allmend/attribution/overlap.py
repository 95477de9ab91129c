"""Records that stand in two places: in the files of two clients, or among training and target records.

A record is known by what training makes of it, its tokens and its targets, not by its id.
"""

import hashlib
from collections.abc import Mapping, Sequence

from allmend.data.chat import Encoded
from allmend.errors import UserError

SHOWN = 5
"""Records named in a message."""


def content_digest(record: Encoded) -> bytes:
    """SHA-256 of a record's tokens, their positions and branches, and which of them are targets."""
    digest = hashlib.sha256()
    for tensor in (record.ids, record.position, record.branch, record.target):
        digest.update(len(tensor).to_bytes(8, "big"))
        digest.update(tensor.numpy().tobytes())
    return digest.digest()


def refuse_shared(owners: Sequence[str], records: Sequence[Encoded]) -> None:
    """Raise where two clients have a record of the same content: its influence would be counted for both.

    Args:
        owners: the client of each record.
        records: encoded.

    Raises:
        UserError: names both clients and both records.
    """
    seen: dict[bytes, tuple[str, str]] = {}
    for owner, record in zip(owners, records, strict=True):
        first, id = seen.setdefault(content_digest(record), (owner, record.id))
        if first != owner:
            raise UserError(
                f"record {record.id!r} of {owner} has the same content as record {id!r} of {first}",
                where="train",
                hint="Leave it in one of the files: whose influence it is could not be said.",
            )


def overlapping(train: Sequence[Encoded], target: Sequence[Encoded]) -> dict[int, str]:
    """Places of target records whose content a training record has, with that record's id."""
    known: Mapping[bytes, str] = {content_digest(record): record.id for record in reversed(train)}
    found = ((place, known.get(content_digest(record))) for place, record in enumerate(target))
    return {place: id for place, id in found if id is not None}


def refuse_overlap(shared: Mapping[int, str], target: Sequence[Encoded]) -> None:
    """Raise where target records are training records.

    Args:
        shared: as of `overlapping`.
        target: the target records.

    Raises:
        UserError: names them.
    """
    if not shared:
        return
    pairs = [
        f"{target[place].id}" if target[place].id == id else f"{target[place].id} ({id} there)"
        for place, id in shared.items()
    ]
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    raise UserError(
        f"{len(pairs)} of {len(target)} target records are training records too: {', '.join(pairs[:SHOWN])}{more}",
        where="target",
        hint="A record helps itself, which says nothing of others. Name other records, or leave these out of the "
        "target with --drop-overlap.",
    )
