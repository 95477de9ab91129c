"""A member's own page: what its records did for a target. It stays with the member; nothing on it was sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend import __version__, intervals
from allmend.report import numbers
from allmend.report.charts import Axis, bars
from allmend.report.markup import Cell, Html, Rows, figure, join, paragraph, section, table, tag
from allmend.report.page import fill
from allmend.run import write_atomic

MOST = 25
"""Records listed at either end."""

LETTERS = 300
"""Of a record's text."""

BINS = 12


@dataclass(frozen=True)
class ScoredRecord:
    """A record of the member.

    Attributes:
        id: of the record.
        target: what it did something for.
        score: above 0 where training on the record lowers the target's loss.
        rank: 1 for the most helpful of the member's records.
        loss: per token (nats).
        text: of the record.
    """

    id: str
    target: str
    score: float
    rank: int
    loss: float
    text: str


def write_own(path: Path, records: Sequence[ScoredRecord], *, client: str, arm: str) -> Path:
    """Write the page and return its path.

    Args:
        path: where to.
        records: the member's, for each target.
        client: the member.
        arm: whose weights influence was measured at.

    Raises:
        UserError: the operating system refused.
    """
    targets = list(dict.fromkeys(record.target for record in records))
    parts = [
        (f"target-{place}", target, [record for record in records if record.target == target])
        for place, target in enumerate(targets)
    ]
    own = len({record.id for record in records})
    facts = [("Member", client), ("Arm", arm), ("Records", numbers.count(own)), ("Allmend", __version__)]
    head = join(
        [
            paragraph("Allmend, this member’s own page", class_="kicker"),
            tag("h1", f"What the records of {client} did"),
            tag("dl", *(tag("div", tag("dt", term), tag("dd", value)) for term, value in facts), class_="facts"),
        ]
    )
    page = fill(
        title=f"{client}: influence · allmend",
        head=head,
        contents=[(anchor, f"For {target}") for anchor, target, _ in parts],
        summary=_summary(records),
        sections=[_target(anchor, target, some) for anchor, target, some in parts],
    )
    write_atomic(path, page.encode(), mode=0o600)
    return path


def _summary(records: Sequence[ScoredRecord]) -> Html:
    harmful = sum(record.score < 0 for record in records)
    return join(
        [
            paragraph(
                "No record and no score of one has left the member: the coordinator sent what the target comes to, and "
                "the records were scored here."
            ),
            paragraph(
                "A score above 0 says that training on the record lowers the target’s loss, at the weights that the "
                "run came to and to first order. Scores have no unit; compare them with each other. "
                + (
                    f"{numbers.out_of(harmful, len(records))} scores are below 0. Look at these records before "
                    "anything is concluded: a rare but right record may score like a wrong one."
                    if harmful
                    else "None is below 0."
                )
            ),
        ]
    )


def _target(anchor: str, target: str, records: Sequence[ScoredRecord]) -> Html:
    ordered = sorted(records, key=lambda record: record.rank)
    mean = intervals.mean([record.score for record in records])
    some = min(MOST, (len(ordered) + 1) // 2)
    helpful = [record for record in ordered[:some] if record.score > 0]
    harmful = [record for record in reversed(ordered[-some:]) if record.score < 0]
    return section(
        anchor,
        f"For {target}",
        paragraph(f"Mean score {numbers.signed(mean.value)} ({numbers.evidence(mean, numbers.signed)})."),
        tag("div", _histogram(target, records), class_="charts"),
        _listed("Most harmful records", harmful) or paragraph("No record has a score below 0."),
        _listed("Most helpful records", helpful) or paragraph("No record has a score above 0."),
    )


def _listed(caption: str, records: Sequence[ScoredRecord]) -> Html:
    rows: Rows = [
        [
            _short(record.text),
            record.id,
            Cell(numbers.signed(record.score), value=record.score),
            Cell(numbers.number(record.loss), value=record.loss),
            Cell(numbers.count(record.rank), value=record.rank),
        ]
        for record in records
    ]
    return table(caption, ["Record", "Id", "Score", "Loss per token (nats)", "Rank"], rows)


def _short(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= LETTERS else line[: LETTERS - 1] + "…"


def _histogram(target: str, records: Sequence[ScoredRecord]) -> Html:
    scores = sorted(record.score for record in records)
    low, high = scores[0], scores[-1]
    if low == high:
        return Html("")
    width = (high - low) / BINS
    counts = [0.0] * BINS
    for score in scores:
        counts[min(BINS - 1, int((score - low) / width))] += 1
    places = [numbers.tick(float(f"{low + (place + 0.5) * width:.2g}")) for place in range(BINS)]
    return figure(
        "How the scores spread",
        bars(f"Scores for {target}", places, [("records", "records", 0, counts)], "score", Axis("records", low=0.0)),
        note="Each bar counts records; its label is the middle of its scores.",
    )
