"""Options that several commands of `allmend attribute` have."""

from pathlib import Path
from typing import Annotated

import typer

Cache = Annotated[
    Path | None,
    typer.Option(help="A folder for the training records' gradients, which are then formed once, also over commands."),
]

DropOverlap = Annotated[
    bool, typer.Option("--drop-overlap", help="Leave target records out that are training records too.")
]
