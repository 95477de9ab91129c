"""Results for programs: JSON on standard output, and nothing beside it. Errors stay words on standard error."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import to_json
from rich.console import Console

from allmend.cli.progress import shown
from allmend.events import Event

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else.")]

EventLines = Annotated[
    bool, typer.Option("--json", help="Print the run's events for programs, one JSON object a line, and nothing else.")
]


def print_json(value: Any) -> None:
    """Print one result: a data class, a pydantic model, or what JSON has; infinite numbers become null."""
    print(to_json(value, indent=1, inf_nan_mode="null").decode(), flush=True)


def silent() -> contextlib.AbstractContextManager[Callable[[Any], None]]:
    """A listener that shows nothing."""
    return contextlib.nullcontext(lambda told: None)


def told(
    console: Console, *, as_json: bool, onward: str = "", run: Path | None = None
) -> contextlib.AbstractContextManager[Callable[[Event], None]]:
    """A listener that shows a run's events to a person (see `shown`), or prints them for a program."""
    if as_json:
        return contextlib.nullcontext(lambda event: print(event.model_dump_json(), flush=True))
    return shown(console, onward=onward, run=run)
