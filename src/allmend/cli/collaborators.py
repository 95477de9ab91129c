"""`allmend collaborators RUN`: whom CoBo has pulled together, or which groups were found."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json
from allmend.cli.figures import show_sections
from allmend.errors import UserError

if TYPE_CHECKING:
    from allmend.results import ArmGraph, ArmGroups


def collaborators(
    run: Annotated[str, typer.Argument(help="A run folder, or RUN:ARM.", metavar="RUN[:ARM]")],
    round: Annotated[int | None, typer.Option(min=1, help="As the graph was after this round.")] = None,
    svg: Annotated[Path | None, typer.Option(help="A file for the heat map.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which clients' models were pulled towards each other, and how often each pair was compared, or their groups.

    allmend collaborators runs/first --svg graph.svg
    """
    from allmend.collaborators import read_collaborators
    from allmend.prepare import read_frozen
    from allmend.report.picture import picture
    from allmend.report.sections.collaborators import graph_map
    from allmend.results import ArmGroups
    from allmend.run import RunFolder, run_and_arm, write_atomic

    named, arm = run_and_arm(run)
    folder = RunFolder.open(named.path)
    found = read_collaborators(folder, read_frozen(folder), arm or None, round=round)
    if svg is not None and isinstance(found, ArmGroups):
        raise UserError(f"arm {found.arm!r} has groups and no graph to draw", where="--svg")
    if isinstance(found, ArmGroups):
        print_json(found) if as_json else show_groups(Console(), found)
        return
    graph = found
    if svg is not None:
        write_atomic(svg, picture([graph_map(graph)], titles=["Who worked with whom"]).encode())
    if as_json:
        print_json(graph)
        return
    show_graph(Console(), graph)
    if svg is not None:
        Console().print(f"Map     {escape(str(svg.resolve()))}", highlight=False, soft_wrap=True)


def show_groups(console: Console, found: "ArmGroups") -> None:
    """Print a line for each client, group by group."""
    from allmend.report.sections.collaborators import groups_in_words, rows_of_groups

    columns = {"client": 24, "own group": 10, "next group": 10}
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, group, own, other in rows_of_groups(found):
        title = str(getattr(group, "shown", group))
        row = tuple(str(getattr(cell, "shown", cell)) for cell in (name, own, other))
        sections.setdefault(title if title == "alone" else f"group {title}", []).append(row)
    show_sections(console, f"Who is of one group in {found.arm}: mean cosines of gradients", columns, sections)
    console.print(escape(groups_in_words(found)), highlight=False, style="dim")


def show_graph(console: Console, graph: "ArmGraph") -> None:
    """Print a line for each client, group by group."""
    from allmend.report.sections.collaborators import graph_in_words, notes_of, rows_of

    columns = {"client": 14, "partners": 26, "mean w": 7, "probes": 7, "last probe": 20}
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, group, partners, mean, probes, last in rows_of(graph):
        row = tuple(str(getattr(cell, "shown", cell)) for cell in (name, partners, mean, probes, last))
        sections.setdefault(f"group {getattr(group, 'shown', group)}", []).append(row)
    show_sections(console, f"Who worked with whom in {graph.arm}", columns, sections)
    for words in (graph_in_words(graph), *notes_of(graph)):
        console.print(escape(words), highlight=False, style="dim")
