"""`allmend audit`: what models memorised, of a run, of a model made elsewhere, of one's own records, side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.comparison import show_comparison
from allmend.cli.outcome import show_audit
from allmend.cli.own import show_own
from allmend.cli.progress import shown
from allmend.cli.unless_named import RunUnlessNamed
from allmend.errors import UserError
from allmend.run import RunFolder, write_atomic

app = typer.Typer(
    cls=RunUnlessNamed,
    help="What models memorised. `allmend audit RUN` is short for `allmend audit run RUN`.",
    no_args_is_help=True,
)


def _check_file(out: Path | None) -> None:
    """Refuse a place for figures before any are made."""
    if out is not None and out.is_dir():
        raise UserError(
            "is a folder, and the figures go to a file", where=out, hint=f"Name one: {out / 'figures.json'}."
        )


@app.command("run")
def audit(
    what: Annotated[
        str, typer.Argument(help="A run folder whose recipe has canaries, or a model.", metavar="RUN|MODEL")
    ],
    canaries: Annotated[Path | None, typer.Option(help="The canaries planted in the data of a model.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter on the model.")] = None,
    reference: Annotated[str | None, typer.Option(help="The model before tuning.")] = None,
    prefix: Annotated[
        list[int] | None, typer.Option(help="Length of the prompts in tokens; may be given several times.", min=1)
    ] = None,
    exposure: Annotated[
        list[str] | None,
        typer.Option(
            help="A secret whose exposure is measured; may be given several times. `none` saves most of the time."
        ),
    ] = None,
    membership_records: Annotated[
        int | None, typer.Option(help="Records of each client that membership is inferred for.", min=0)
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="An arm of a run, or one client's own model, ARM/CLIENT, in the place of the recipe's; may be given "
            "several times.",
            metavar="ARM[/CLIENT]",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the audit of a model goes; `audit` when absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask models for canaries, controls beside them, and write the audit and the report.

    Of a run, with its own settings:  allmend audit runs/first

    With other prompts:               allmend audit runs/first --prefix 20 --prefix 50

    In a fraction of the time:        allmend audit runs/first --exposure none

    Of clients' own models:           allmend audit runs/first --arm cobo --arm local/north

    Of a model made elsewhere:        allmend audit MODEL --adapter DIR --canaries canaries.jsonl
    """
    from allmend.audit_runs.folders import audit_folder
    from allmend.audit_runs.runs import audit_run
    from allmend.recipe import Audit

    console = Console()
    changes: dict[str, Any] = {"prefix_tokens": prefix} if prefix else {}
    if exposure:
        changes["exposure"] = [slot for slot in exposure if slot != "none"]
    if membership_records is not None:
        changes["membership_records"] = membership_records
    if arm:
        changes["models"] = arm
    if RunFolder(Path(what)).marker.exists():
        run = Path(what)
        for name, value in (("--adapter", adapter), ("--reference", reference), ("--out", out)):
            if value is not None:
                raise UserError(f"{name} is for a model, and this is a run", where=run, hint="Leave it out.")
        with silent() if as_json else shown(console) as listen:
            table = audit_run(run, canaries=canaries, changes=changes, listeners=[listen])
        report = run / "report.html"
    else:
        if canaries is None:
            raise UserError(
                "no run is here, and to audit a model its canaries are needed",
                where=what,
                hint="Name a run folder, or the canaries that were planted: --canaries canaries.jsonl.",
            )
        if arm:
            raise UserError("--arm is for a run, and this is a model", where=what, hint="Leave it out.")
        folder = out or Path("audit")
        with silent() if as_json else shown(console) as listen:
            table = audit_folder(
                what,
                canaries,
                out=folder,
                adapter=adapter,
                reference=reference,
                settings=Audit(**changes),
                listeners=[listen],
            )
        report = folder / "report.html"
    if as_json:
        print_json(table)
        return
    show_audit(console, table)
    console.print(f"Report  {escape(str(report.resolve()))}", highlight=False, soft_wrap=True)


@app.command("compare")
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders, or RUN:ARM for one arm of a run.", metavar="RUN[:ARM]...")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put audited models side by side: utility, memorisation, privacy; each against the first.

    The arms of a run:     allmend audit compare runs/first

    Arms of several runs:  allmend audit compare runs/first:fedavg runs/second:fedavg
    """
    from allmend.audit_runs.side_by_side import compare_runs

    _check_file(out)
    comparison = compare_runs(runs)
    print_json(comparison) if as_json else show_comparison(Console(), comparison)
    if out is not None:
        write_atomic(out, comparison.model_dump_json(indent=1).encode())


@app.command("mine")
def mine(
    run: Annotated[Path, typer.Argument(help="A run, or a copy of its folder.")],
    data: Annotated[Path, typer.Option(help="Your own records, in a form that recipes take.")],
    controls: Annotated[Path | None, typer.Option(help="Records of the same kind that nobody trained on.")] = None,
    suffix: Annotated[int, typer.Option(help="Most tokens that a model is asked for.", min=1)] = 50,
    out: Annotated[Path | None, typer.Option(help="Write the figures, record by record, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a run's models for your own records, on your own machine. Nothing leaves it."""
    from allmend.audit_runs import own

    _check_file(out)
    console = Console()
    with silent() if as_json else shown(console) as listen:
        table = own.mine(run, data, controls=controls, suffix_tokens=suffix, listeners=[listen])
    print_json(table) if as_json else show_own(console, table)
    if out is not None:
        write_atomic(out, table.model_dump_json(indent=1).encode())
