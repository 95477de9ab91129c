"""`allmend depth scan`: what every stretch of layers costs when it runs otherwise."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.depth_options import Calibration, Device, Merge, Model
from allmend.cli.figures import show_sections
from allmend.cli.progress import shown

if TYPE_CHECKING:
    from allmend.pairing.folders import Scanned

SHOWN = 5
"""Stretches of a kind."""


def scan(
    model: Model,
    kinds: Annotated[
        str, typer.Option(help="Of pairs, triples, parallel, parallel_sum, merge, prune, shuffle; with commas.")
    ] = "pairs,prune",
    longest: Annotated[int, typer.Option(min=1, help="Longest stretch, in layers.")] = 8,
    calibration: Calibration = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for scan.parquet, scan.svg and depth.html; a stopped scan goes on.")
    ] = None,
    merge: Merge = False,
    device: Device = "",
    seed: Annotated[int, typer.Option(help="Of shuffle.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure every stretch of layers side by side, left out, merged, shuffled.

    A first look:  allmend depth scan MODEL

    On text of your own, kept with a heat map:  allmend depth scan MODEL --calibration text.txt --out scanned
    """
    from allmend.pairing.folders import scan_folder
    from allmend.pairing.pages import PAGE

    with silent() if as_json else shown(Console()) as listen:
        found = scan_folder(
            model,
            kinds=[kind.strip() for kind in kinds.split(",")],  # type: ignore[misc]  # checked there
            longest=longest,
            calibration=calibration,
            out=out,
            merge=merge,
            device=device or None,
            seed=seed,
            listeners=[listen],
        )
    if as_json:
        print_json(found)
        return
    show_scan(Console(), found)
    if out is not None:
        Console().print(f"Report  {escape(str((out / PAGE).resolve()))}", highlight=False, soft_wrap=True)


def show_scan(console: Console, found: "Scanned") -> None:
    """Print the cheapest stretches of each kind."""
    from allmend.report.depth_figures import span
    from allmend.results import KINDS_IN_WORDS

    columns = {"layers": 10, "steps left": 10, "added, nats a token": 20, "tokens": 8}
    sections = {}
    for kind in dict.fromkeys(cell.kind for cell in found.cells):
        some = sorted((cell for cell in found.cells if cell.kind == kind), key=lambda cell: cell.added)
        rows = [
            (
                span(cell.start, cell.end),
                str(cell.depth),
                f"{cell.added:+.3f} ± {cell.error:.3f}",
                f"{cell.tokens:,}",
            )
            for cell in some[:SHOWN]
        ]
        sections[f"{kind}: {KINDS_IN_WORDS[kind]}"] = rows
    show_sections(console, f"The cheapest stretches of {found.layers} layers", columns, sections)
    console.print(
        f"Added to the loss on {escape(found.text)}, {found.loss:.3f} nats a token as it is, ± a standard error. What "
        "was clearly behind others of its length was measured on fewer tokens.",
        style="dim",
        highlight=False,
    )
    for note in found.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
