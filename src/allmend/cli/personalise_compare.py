"""`allmend personalise compare RUN`: whether it paid to learn together, for each member."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from allmend.cli.as_json import AsJson, print_json
from allmend.cli.figures import show_sections

if TYPE_CHECKING:
    from allmend.report.markup import Cell
    from allmend.results import PersonalisedTable

_DIFFERENCE = 3
"""Place of the figure whose interval stands beside it."""

_COST = 5
"""Place of the first figure of what an arm costs."""


def compare(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    against: Annotated[
        str | None, typer.Option(help="The arm that the others are compared with; the one that trains alone if absent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a run's arms on each client's own held-out records, and tell for whom working together paid.

    allmend personalise compare runs/first

    A finished run keeps the table in results/personalised.json.
    """
    from allmend.personalised import TABLE, compare_arms
    from allmend.run import RunFolder

    folder = RunFolder.open(run)
    table = compare_arms(folder, against)
    if not folder.worked_on:  # which writes it at its end
        with folder.lock():
            folder.write_table(TABLE, table)
    if as_json:
        print_json(table)
    else:
        show_personalised(Console(), table)


def show_personalised(console: Console, table: "PersonalisedTable") -> None:
    """Print a line for each arm, then for each client its loss in every arm and whether working together paid."""
    from allmend.report.numbers import thousandths
    from allmend.report.sections.personalised import arm_rows, in_words, notes_of, paid_in_words

    rows = [[_line(cell, under=place == _DIFFERENCE) for place, cell in enumerate(row)] for row in arm_rows(table)]
    columns = {"": 16, "loss": 8, "perplexity": 10, f"minus {table.against}": 25, "worst regret": 12}
    shown = [place for place in range(len(columns)) if table.against or place != _DIFFERENCE]
    columns = {name: width for place, (name, width) in enumerate(columns.items()) if place in shown}
    title = "Each client's own held-out records: nats per token, mean over clients"
    show_sections(console, title, columns, {"": [[row[place] for place in shown] for row in rows]})
    columns = {"": 16, "down": 8, "up": 10, "steps": 8, "passes": 8}
    show_sections(console, "What it took for a client", columns, {"": [[row[0], *row[_COST:]] for row in rows]})
    title = f"Did working together pay, against {table.against}?" if table.against else "By client"
    console.print(f"[bold]{escape(title)}[/bold]", highlight=False)
    for row in table.members:
        words = f": {paid_in_words(row, table)}" if table.against else ""
        console.print(f"[bold]{escape(row.member)}[/bold]{escape(words)}", highlight=False, soft_wrap=True)
        losses = (f"{escape(name)} {thousandths(loss.value)}" for name, loss in row.losses.items())
        marked = (
            f"[bold]{one}[/bold]" if name == row.best else one for name, one in zip(row.losses, losses, strict=True)
        )
        console.print(Padding("  ".join(marked), (0, 0, 0, 2)), highlight=False)
    console.print()
    for words in ([in_words(table)] if table.against else []) + notes_of(table):
        console.print(escape(words), highlight=False, style="dim")


def _line(cell: "str | Cell", *, under: bool) -> str:
    """A cell of the report on one line."""
    if isinstance(cell, str):
        return escape(cell)
    return escape(f"{cell.shown} ({cell.under})" if under and cell.under else cell.shown)
