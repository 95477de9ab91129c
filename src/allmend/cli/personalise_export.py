"""`allmend personalise export RUN`: a plain adapter in the place of a member's mixture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json
from allmend.cli.figures import show_sections
from allmend.errors import UserError

if TYPE_CHECKING:
    from allmend.mixtures.export import Exported


def export(
    run: Annotated[
        str,
        typer.Argument(help="A run folder, or a member's own of a run among organisations.", metavar="RUN[:ARM]"),
    ],
    how: Annotated[
        Literal["generalist", "mean-gates"],
        typer.Option(help="The shared experts alone, or all experts with their mean weights."),
    ],
    out: Annotated[Path, typer.Option(help="A folder for the adapter; one that is there is replaced.")],
    member: Annotated[str | None, typer.Option(help="Whose mixture; in a member's own folder it is its own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a LoRA that PEFT loads for a client's mixture, and measure what it loses beside it.

    allmend personalise export runs/first:comigs --member north --how mean-gates --out north-adapter

    At a member:  allmend personalise export allmend-north --how mean-gates --out north-adapter
    """
    from allmend.consortium.own import is_own, open_own
    from allmend.consortium.personal import export_own
    from allmend.mixtures.export import export as export_to
    from allmend.run import run_and_arm

    named, arm = run_and_arm(run)
    if is_own(named.path):
        own = open_own(named.path)
        if member not in (None, own.member):
            raise UserError(f"this is the folder of {own.member!r}", where="--member", hint="Leave it out.")
        found = export_own(own, out, how=how, arm=arm or None)
    elif member is None:
        raise UserError("no client is named", where="--member", hint="Name the client whose mixture it is.")
    else:
        found = export_to(named.path, out, member=member, how=how, arm=arm or None)
    if as_json:
        print_json(found)
        return
    show_export(Console(), found)


def show_export(console: Console, found: "Exported") -> None:
    """Print the losses of a mixture and of its export, and where the adapter is."""
    from allmend.report.export_card import added, in_words

    columns = {"records": 18, "mixture": 8, "adapter": 8, "added loss": 28}
    rows = [
        (f"{one.count:,} {one.records}", f"{one.mixture.value:.3f}", f"{one.export.value:.3f}", added(one.added))
        for one in found.compared
    ]
    title = f"{found.member}'s mixture in {found.arm} as one LoRA of rank {found.rank} ({found.how})"
    show_sections(console, title, columns, {"": rows} if rows else {})
    words = " ".join(in_words(one) for one in found.compared) or "The client has no record to compare them on."
    console.print(f"{words} Losses are nats a token.", highlight=False, style="dim")
    console.print(f"Adapter {escape(str(found.out.resolve()))}", highlight=False, soft_wrap=True)
