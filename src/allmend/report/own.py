"""A member's own page: what its records did for a target. It stays with the member; nothing on it was sent."""

from collections.abc import Sequence
from pathlib import Path

from allmend import __version__, intervals
from allmend.report import numbers
from allmend.report.influence_figures import ScoredRecord, ends, record_table, score_histograms
from allmend.report.markup import Html, join, paragraph, section, tag
from allmend.report.page import fill, head_of
from allmend.run import write_atomic

LETTERS = 300
"""Of a record's text."""


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
    head = head_of("Allmend, this member’s own page", f"What the records of {client} did", facts)
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
    scores = [record.score for record in records]
    mean = intervals.mean(scores)
    helpful, harmful = ends(records)

    def listed(caption: str, some: Sequence[ScoredRecord]) -> Html:
        return record_table(caption, some, letters=LETTERS, of=len(records))

    return section(
        anchor,
        f"For {target}",
        paragraph(f"Mean score {numbers.signed(mean.value)} ({numbers.evidence(mean, numbers.signed)})."),
        tag("div", score_histograms({"": scores}, {}, title="How the scores spread"), class_="charts"),
        listed("Most harmful records", harmful) or paragraph("No record has a score below 0."),
        listed("Most helpful records", helpful) or paragraph("No record has a score above 0."),
    )
