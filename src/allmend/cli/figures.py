"""Estimates in words, and tables of them that fit a terminal of 80 columns."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from allmend.results import Estimate

ABSENT = "–"
"""Stands for a figure that was not measured."""


def percent(estimate: Estimate | None) -> str:
    """`54.0 % (48.1 to 60.2 %)`, where n stands elsewhere."""
    if estimate is None:
        return ABSENT
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.0f} %"
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f} %)"


def points(estimate: Estimate | None) -> str:
    """A difference of shares: `+18.3 points (+11.4 to +25.3)`."""
    if estimate is None:
        return ABSENT
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:+.1f} points"
    return f"{100 * estimate.value:+.1f} points ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def plain(estimate: Estimate | None, form: str = ".2f") -> str:
    """`0.95 (0.45 to 1.46)`."""
    if estimate is None:
        return ABSENT
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def count(estimate: Estimate | None) -> str:
    """A share as a count: `3 of 16`."""
    return ABSENT if estimate is None else f"{round(estimate.value * estimate.n)} of {estimate.n}"


def show_sections(
    console: Console, title: str, columns: Mapping[str, int], sections: Mapping[str, Sequence[Sequence[str]]]
) -> None:
    """Print a table whose rows stand under headings of their own, which may be as long as they like.

    Args:
        console: where to.
        title: of the whole.
        columns: heads and widths; a name is no column.
        sections: rows of cells by heading; without a line for an empty one.
    """

    def table(*, head: bool) -> Table:
        made = (Column(name, width=width, header_style="none") for name, width in columns.items())
        return Table(*made, box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=head)

    console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
    console.print(table(head=True))
    for heading, rows in sections.items():
        if heading:
            console.print(f"[bold]{escape(heading)}[/bold]", highlight=False, soft_wrap=True)
        body = table(head=False)
        for row in rows:
            body.add_row(*row)
        console.print(body)
    console.print()
