"""Which totals a run has formed over whom: two of one thing that differ by one member show that member's part."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from allmend.errors import UserError
from allmend.run import write_atomic


@dataclass(frozen=True)
class Total:
    """A sum over members, at an arm's final weights.

    Attributes:
        groups: what is summed, such as sizes and blocks.
        members: over whom.
        clip: norm that gradients were scaled down to; None where they were not.
        min_records: fewest records of a member that adds something.
    """

    groups: tuple[str, ...]
    members: tuple[str, ...]
    clip: float | None
    min_records: int

    def apart(self, other: "Total") -> str:
        """Why the difference of both would show something; empty where it would not."""
        if not (both := sorted(set(self.groups) & set(other.groups))):
            return ""
        what = f"{' and '.join(both)} were summed"
        if apart := sorted(set(self.members) ^ set(other.members)):
            return (
                f"{what} over {', '.join(sorted(other.members))} before, and now {', '.join(apart)} would make the "
                "difference"
            )
        if both == ["target"]:  # held-out records, of which there is neither a fewest number nor a norm
            return ""
        if self.min_records != other.min_records:
            return (
                f"{what} with min_records = {other.min_records} before, and now with {self.min_records}: who has a "
                "number of records in between would make the difference"
            )
        if self.clip != other.clip:
            now, before = (f"clip = {one:g}" if one else "no clip" for one in (self.clip, other.clip))
            return (
                f"{what} with {before} before, and now with {now}: the records with long gradients would make the "
                "difference"
            )
        return ""


@dataclass(frozen=True)
class Totals:
    """Those of an arm, in a file.

    Attributes:
        path: JSON, one object a total.
        arm: name.
        again: whether totals may be formed otherwise than before.
    """

    path: Path
    arm: str
    again: bool = False

    def check(self, total: Total) -> None:
        """Refuse a total whose difference to one before would show somebody's part.

        Raises:
            UserError: so it is.
        """
        for before in () if self.again else self._read():
            if apart := total.apart(before):
                raise UserError(
                    f"arm {self.arm!r}: {apart}; two sums that differ by one member, or by few records, show what "
                    "these records are like",
                    where=self.path.parent,
                    hint="Ask the same members the same way; or, where all agree that this may be seen, "
                    "`allmend attribute RUN --members FILE --again`.",
                )

    def keep(self, total: Total) -> None:
        """Check a total, and keep in mind that it is about to be opened."""
        self.check(total)
        if total.groups and total not in (before := self._read()):
            write_atomic(self.path, json.dumps([asdict(one) for one in (*before, total)]).encode())

    def _read(self) -> list[Total]:
        if not self.path.exists():
            return []
        try:
            return [_total(**one) for one in json.loads(self.path.read_bytes())]
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"what was summed before cannot be read: {error}", where=self.path) from error


def _total(groups: Sequence[str], members: Sequence[str], clip: float | None, min_records: int) -> Total:
    return Total(tuple(groups), tuple(members), clip, min_records)
