"""`allmend audit`: measure again what a run's models memorised."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from allmend.cli.outcome import show_audit
from allmend.cli.progress import shown


def audit(
    run: Annotated[Path, typer.Argument(help="A run folder whose recipe has canaries.")],
    prefix: Annotated[
        list[int] | None, typer.Option(help="Length of the prompts in tokens; may be given several times.", min=1)
    ] = None,
) -> None:
    """Ask a run's models for its canaries, controls beside them, and write the audit and the report."""
    from allmend import life

    console = Console()
    with shown(console, run) as listen:
        table = life.audit_run(run, prefix_tokens=prefix, listeners=[listen])
    show_audit(console, table)
    console.print(f"Report  {(run / 'report.html').resolve()}", highlight=False, soft_wrap=True)
