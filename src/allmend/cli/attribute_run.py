"""`allmend attribute run`: which records moved an adapter towards a target."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.attribute_options import Cache, DropOverlap, Template, template_of
from allmend.cli.figures import ABSENT, percent, plain, show_sections
from allmend.cli.progress import counted, shown

if TYPE_CHECKING:
    from allmend.attribution.folders import Attributed
    from allmend.influence.table import InfluenceTable, Row

SHOWN = 10
"""Records shown at either end."""

LETTERS = 80

MARK = "?"
"""Beside a score that is to be taken with care."""


def run(
    model: Annotated[str, typer.Argument(help="The adapter's base: a folder, a Hub name, a GGUF file.")],
    adapter: Annotated[Path, typer.Option(help="A PEFT folder with a LoRA.")],
    train: Annotated[list[Path], typer.Option(help="Training records; each file counts as a client.")],
    target: Annotated[Path, typer.Option(help="Records whose loss is what matters.")],
    method: Annotated[str, typer.Option(help="gfim, exact, datainf, lissa or hessian_free.")] = "gfim",
    damping: Annotated[float, typer.Option(help="Times the mean eigenvalue of each block.")] = 0.1,
    side: Annotated[str, typer.Option(help="wide or rank, of gfim.")] = "wide",
    inverse: Annotated[
        str,
        typer.Option(
            help="cholesky, eigen or hyperpower, of gfim; auto: what `allmend attribute inverse` found on this device."
        ),
    ] = "auto",
    modules: Annotated[str | None, typer.Option(help="A regular expression for names of weights.")] = None,
    targets: Annotated[str, typer.Option(help="mean, each, or group:FIELD for one by label.")] = "mean",
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest record, in tokens.")] = 512,
    template: Template = "auto",
    drop_overlap: DropOverlap = False,
    cache: Cache = None,
    damping_sweep: Annotated[
        bool, typer.Option("--damping-sweep", help="Show what other dampings, 0.001 to 10, make of the order.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for influence.parquet, influence.json and a page, influence.html.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score training records by what they did for a target.

    A score above 0 says that training on the record lowered the target's loss.

    Of an adapter made anywhere:  allmend attribute MODEL --adapter DIR --train north.jsonl --target test.jsonl

    With more clients, each a file; one target for each label; and kept for other programs:

    allmend attribute MODEL --adapter DIR --train a.jsonl --train b.jsonl --target c.jsonl --targets group:kind --out X
    """
    from allmend.attribution.folders import attribute_folder
    from allmend.attribution.pages import PAGE
    from allmend.attribution.settings import Settings
    from allmend.errors import UserError
    from allmend.recipe import Fields

    kind, colon, label = targets.partition(":")
    if (kind, bool(colon), bool(label)) not in (("mean", False, False), ("each", False, False), ("group", True, True)):
        raise UserError(f"{targets!r} is none of mean, each and group:FIELD", where="--targets")
    if side not in ("wide", "rank"):
        raise UserError(f"{side!r} is none of wide, rank", where="--side")
    settings = Settings(
        method=method,  # type: ignore[arg-type]  # checked there
        damping=damping,
        side="wide" if side == "wide" else "rank",
        inverse=inverse,
        modules=modules,
        targets="kind" if kind == "group" else "each" if kind == "each" else "mean",
        max_tokens=max_tokens,
        template=template_of(template),
        drop_overlap=drop_overlap,
        sweep=damping_sweep,
        cache=cache,
    )
    fields = Fields(kind=label) if label else Fields()
    with silent() if as_json else shown(Console()) as listen:
        found = attribute_folder(
            model, adapter, train=train, target=target, out=out, fields=fields, settings=settings, listeners=[listen]
        )
    if as_json:
        print_json({"table": found.table, "rows": found.rows})
        return
    show_influence(Console(), found)
    if out is not None:
        Console().print(f"Written to {escape(str(out))}", highlight=False, soft_wrap=True)
        Console().print(f"Report  {escape(str((out / PAGE).resolve()))}", highlight=False, soft_wrap=True)


def show_influence(console: Console, found: "Attributed") -> None:
    """Print the records at both ends, the clients, and how sure that is.

    Args:
        console: where to.
        found: rows and table.
    """
    from allmend.report.influence_figures import how_sure

    names = list(dict.fromkeys(row.target for row in found.rows))
    for name in names:
        rows = sorted((row for row in found.rows if row.target == name), key=lambda row: row.rank)
        rows = [row for row in rows if row.score is not None]
        columns = {"rank": 6, "record": 20, "client": 14, "score": 12, "loss": 6}
        some = min(SHOWN, (len(rows) + 1) // 2)
        helpful = [row for row in rows[:some] if (row.score or 0) > 0]
        harmful = [row for row in reversed(rows[-some:]) if (row.score or 0) < 0]
        sections = {
            "Most helpful": [_cells(row) for row in helpful] or [("", "none helped", "", "", "")],
            "Most harmful": [_cells(row) for row in harmful] or [("", "none hurt", "", "", "")],
        }
        show_sections(console, f"Target {name}", columns, sections)
        for row in (*helpful[:3], *harmful[:3]):
            if text := found.texts.get((row.client, row.record_id)):
                console.print(f"{escape(row.record_id)}: {escape(_short(text))}", style="dim", highlight=False)
    shown_clients = {
        name: [
            (one.client, plain(one.mean, "+.3g"), percent(one.harmful))
            for one in found.table.clients
            if one.target == name
        ]
        for name in names
    }
    show_sections(console, "By client", {"client": 18, "mean score": 34, "below 0": 26}, shown_clients)
    table = found.table
    console.print(f"Score {table.sign}. Damping {table.damping:g} of each block's mean eigenvalue.", highlight=False)
    for words in table.cautions:
        console.print(f"[yellow]{MARK}[/yellow] {escape(words)}", highlight=False)
    for name, agrees in table.reliability.items():
        console.print(f"{escape(name)}: {how_sure(agrees)} (Spearman {plain(agrees)}).", highlight=False)
    if table.skipped:
        console.print(f"{counted(len(table.skipped), 'module')} without a gradient left out.", highlight=False)
    for client, ids in table.silent.items():
        more = " …" if len(ids) > SHOWN else ""
        console.print(f"Without a score, {escape(client)}: {escape(', '.join(ids[:SHOWN]))}{more}", highlight=False)
    for note in table.notes:
        console.print(escape(note), highlight=False)
    if table.sweep:
        _show_sweep(console, table)


def _show_sweep(console: Console, table: "InfluenceTable") -> None:
    from allmend.influence.damping_sweep import NO_TARGET

    columns = {"damping": 9, f"order as with {table.damping:g}": 20, "order of two halves": 30}
    sections = {
        name: [
            (
                f"{one.damping:g}",
                ABSENT if one.agreement is None else f"{one.agreement:.3f}",
                plain(one.reliability),
            )
            for one in table.sweep
            if one.target == name
        ]
        for name in dict.fromkeys(one.target for one in table.sweep)
    }
    show_sections(console, "Under other dampings", columns, sections)
    console.print(f"Spearman's correlations. {NO_TARGET}", highlight=False)


def _cells(row: "Row") -> Sequence[str]:
    mark = f" {MARK}" if row.caution else ""
    score, loss = f"{row.score or 0:+.3g}{mark}", f"{row.loss or 0:.2f}"
    return (str(row.rank), escape(row.record_id[:20]), escape(row.client[:14]), score, loss)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LETTERS else line[: LETTERS - 1] + "…"
