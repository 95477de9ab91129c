"""Which records a client learns from and which it never sees: a hash of the record's id decides.

The same id falls on the same side on every machine, in every Python version and whatever other records stand
beside it, so a data set that grows keeps its held-out records.
"""

import hashlib
from collections.abc import Iterable

from allmend.data.records import Record


def uniform(id: str, *, salt: str = "") -> float:
    """A number in [0, 1) that depends on `id` and `salt` alone and is spread evenly over ids."""
    # the salt goes in as the key, so that ("a", "bc") and ("ab", "c") are different inputs
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    digest = hashlib.blake2b(id.encode(), digest_size=8, key=key).digest()
    # 53 bits fit a double exactly; all 64 could round up to 1.0
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def is_held_out(id: str, share: float, *, salt: str = "") -> bool:
    """Whether the record `id` is held out when a `share` of all records is.

    What is held out at one share stays held out at every larger one.

    Args:
        id: the record's id.
        share: in [0, 1]; 0 holds out nothing, 1 everything.
        salt: another salt gives another, independent split.

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of held-out records must lie in [0, 1], not {share}")
    return uniform(id, salt=salt) < share


def split(records: Iterable[Record], share: float) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Training and held-out records, each in the order given.

    `Record.held_out` decides where it is set, the hash of the id elsewhere. Should the hash leave nothing to
    learn from, as may happen with one or two records, the record that would be held out last is learnt from.

    Args:
        records: the client's records.
        share: the share to hold out, in [0, 1].

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    records = tuple(records)
    held = [is_held_out(r.id, share) if r.held_out is None else r.held_out for r in records]
    undecided = [i for i, record in enumerate(records) if record.held_out is None]
    if share < 1 and undecided and all(held):
        held[max(undecided, key=lambda i: uniform(records[i].id))] = False
    train = tuple(record for record, out in zip(records, held, strict=True) if not out)
    held_out = tuple(record for record, out in zip(records, held, strict=True) if out)
    return train, held_out
