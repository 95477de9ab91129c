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

_COST = ("Down", "Up", "Steps", "Passes")
"""Columns of what an arm took."""


def compare(
    run: Annotated[Path, typer.Argument(help="A run folder, or a member's own of a run among organisations.")],
    against: Annotated[
        str | None, typer.Option(help="The arm that the others are compared with; the one that trains alone if absent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a run's arms on each client's own held-out records, and tell for whom working together paid.

    allmend personalise compare runs/first

    A finished run keeps the table in results/personalised.json. In a member's own folder (allmend-NAME) it is about
    that member alone, with the base model beside the arms.
    """
    from allmend.consortium.own import is_own, open_own
    from allmend.consortium.personal import compare_own
    from allmend.personalised import TABLE, compare_arms
    from allmend.run import RunFolder

    if is_own(run):
        table = compare_own(open_own(run), against)
    else:
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
    from allmend.report.sections.personalised import arm_table, in_words, notes_of, paid_in_words, question
    from allmend.results import BASE

    head, rows = arm_table(table)
    widths = {"Loss": 8, "Perplexity": 10, "Down": 8, "Up": 10, "Steps": 8, "Passes": 8}
    widths |= {name: 12 for name in head if name.endswith("egret")}
    widths |= {name: 25 for name in head if name.startswith("Minus")}
    lines = [
        {name: _line(cell, under=name.startswith("Minus")) for name, cell in zip(head, row, strict=True)}
        for row in rows
    ]

    def show(title: str, names: list[str]) -> None:
        columns = {"": 16} | {name[0].lower() + name[1:]: widths[name] for name in names}
        show_sections(console, title, columns, {"": [[line["Arm"], *(line[name] for name in names)] for line in lines]})

    whose = f"{table.members[0].member}'s held-out records: nats per token"
    several = "Each client's own held-out records: nats per token, mean over clients"
    title = whose if len(table.members) == 1 else several
    show(title, [name for name in head if name in widths and name not in _COST])
    show("What it took for a client", [name for name in head if name in _COST])
    title = "By client"
    if table.against == BASE:
        title = question(table)
    elif table.against:
        title = f"Did working together pay, against {table.against}?"
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
    for words in ([in_words(table)] if table.against and len(table.members) > 1 else []) + notes_of(table):
        console.print(escape(words), highlight=False, style="dim")


def _line(cell: "str | Cell", *, under: bool) -> str:
    """A cell of the report on one line."""
    if isinstance(cell, str):
        return escape(cell)
    return escape(f"{cell.shown} ({cell.under})" if under and cell.under else cell.shown)
