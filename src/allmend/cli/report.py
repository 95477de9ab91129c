"""`allmend report`: write a run's page again."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the HTML report of a run, finished or not."""
    from allmend.report.page import write_report
    from allmend.run import RunFolder

    path = write_report(RunFolder.open(run).path)
    Console().print(f"Report  {path.resolve()}", highlight=False, soft_wrap=True)
