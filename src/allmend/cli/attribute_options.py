"""Options that several commands of `allmend attribute` have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Cache = Annotated[
    Path | None,
    typer.Option(help="A folder for the training records' gradients, which are then formed once, also over commands."),
]

DropOverlap = Annotated[
    bool, typer.Option("--drop-overlap", help="Leave target records out that are training records too.")
]

Template = Annotated[str, typer.Option(help="auto, chat or plain, as in training.")]


def template_of(name: str) -> Literal["auto", "chat", "plain"]:
    """What `--template` says.

    Raises:
        UserError: it is none of them.
    """
    from allmend.errors import UserError

    match name:
        case "auto":
            return "auto"
        case "chat":
            return "chat"
        case "plain":
            return "plain"
    raise UserError(f"{name!r} is none of auto, chat, plain", where="--template")
