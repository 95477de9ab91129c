"""Did working together pay, for one member: a page of its own, which the coordinator cannot make."""

from pathlib import Path

from allmend import __version__
from allmend.report import numbers
from allmend.report.markup import join, listed, paragraph, section, table, tag
from allmend.report.page import fill, head_of
from allmend.report.sections.personalised import arm_table, notes_of, paid_in_words, question
from allmend.results import PersonalisedTable
from allmend.run import write_atomic


def write_own_comparison(path: Path, found: PersonalisedTable, *, run: str, records: int) -> Path:
    """Write a member's own page, which only it can read, and return its path.

    Args:
        path: where to.
        found: with this member alone.
        run: what the run is called.
        records: that the member holds out.

    Raises:
        UserError: the operating system refused.
    """
    (row,) = found.members
    facts = [("Member", row.member), ("Run", run), ("Records", numbers.count(records)), ("Allmend", __version__)]
    title = "Did working together pay?" if question(found) == "Did it pay?" else question(found)
    page = fill(
        title=f"{row.member}: {title} · allmend",
        head=head_of("Allmend, this member’s own page", f"{row.member}: {title}", facts),
        contents=[("arms", "Arms")],
        summary=join(
            [
                *([paragraph(tag("strong", sentence(paid_in_words(row, found))))] if found.against else []),
                paragraph(
                    "Scores of single records have not left the member: of them, the coordinator was told sums alone."
                ),
            ]
        ),
        sections=[
            section(
                "arms",
                "Arms",
                table("Loss per token (nats) on your held-out records (95 % interval)", *arm_table(found)),
                listed(notes_of(found)),
            )
        ],
    )
    write_atomic(path, page.encode(), mode=0o600)
    return path


def sentence(words: str) -> str:
    """With a large letter and a full stop."""
    return f"{words[0].upper()}{words[1:]}."
