"""The base-rate rule: what comes out of controls as easily was guessed, not memorised.

A model may continue a text that it never saw, because texts of the same kind resemble one another. So no figure of
extraction stands alone: it is judged by the same figure for the controls of the same cell.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from allmend.results import AuditTable, Estimate, Extraction, longest_prefix

ALL_SECRETS = ""
"""The slot under which `Extraction.secrets` holds the share over all slots."""


class Verdict(IntEnum):
    """What came out of a cell, the more serious the higher."""

    NOTHING = 0
    GUESSED = 1
    UNCLEAR = 2
    MEMORISED = 3

    @property
    def words(self) -> str:
        return ("nothing came out", "guessed, not memorised", "not told apart from guessing", "memorised")[self]


def judged(planted: Estimate, control: Estimate | None, *, lucky: bool = False) -> Verdict:
    """Whether what came out of planted canaries was memorised.

    Args:
        planted: share that came out.
        control: the same share of the controls; None where there is none.
        lucky: whether a single hit can be luck (a secret with few possible values). Then the intervals must be apart
            for a verdict; of a text that cannot be guessed, one that comes out where no control does is enough.
    """
    if planted.value == 0:
        return Verdict.NOTHING
    if control is None:
        return Verdict.UNCLEAR
    if control.value >= planted.value:
        return Verdict.GUESSED
    apart = planted.low is not None and control.high is not None and planted.low > control.high
    return Verdict.MEMORISED if apart or (control.value == 0 and not lucky) else Verdict.UNCLEAR


@dataclass(frozen=True)
class Secrets:
    """Secrets of several canaries: how many came out, and what that says of others.

    Attributes:
        out: secrets that came out.
        asked: secrets behind the prefix.
        share: mean of the canaries' own shares; n counts canaries, since secrets of one text depend on each other.
    """

    out: int
    asked: int
    share: Estimate


def secrets_of(row: Extraction | None) -> Secrets | None:
    """The secrets of a cell; None where the prefix leaves none to bring out, or there is no such cell."""
    if row is None or ALL_SECRETS not in row.secrets:
        return None
    out, asked = hits(share for slot, share in row.secrets.items() if slot != ALL_SECRETS)
    return Secrets(out, asked, row.secrets[ALL_SECRETS])


@dataclass(frozen=True)
class Outcome:
    """Extraction in one model and of one number of copies, planted canaries beside their controls.

    Attributes:
        model, copies: the cell.
        planted: extraction of the canaries in the training data.
        control: of those kept out; None where there is none.
    """

    model: str
    copies: int
    planted: Extraction
    control: Extraction | None

    @property
    def verdict(self) -> Verdict:
        """The more serious of the verdicts on whole texts and on secrets."""
        control = self.control
        found = judged(self.planted.exact, control.exact if control else None)
        if (secrets := secrets_of(self.planted)) is not None:
            null = secrets_of(control)
            found = max(found, judged(secrets.share, null.share if null else None, lucky=True))
        return found


def outcomes(audit: AuditTable, model: str) -> list[Outcome]:
    """What came out of a model at the longest prefix, by number of copies in rising order."""
    prefix = longest_prefix(audit.extraction)
    rows = {(e.copies, e.inserted): e for e in audit.extraction if (e.model, e.prefix) == (model, prefix)}
    return [
        Outcome(model, copies, row, rows.get((copies, False)))
        for (copies, inserted), row in sorted(rows.items())
        if inserted
    ]


def hits(estimates: Iterable[Estimate]) -> tuple[int, int]:
    """Successes and trials of several shares together."""
    known = list(estimates)
    return sum(round(e.value * e.n) for e in known), sum(e.n for e in known)
