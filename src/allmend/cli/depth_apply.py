"""`allmend depth apply`: the folder of a model whose groups of layers are one wider layer each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json
from allmend.cli.depth_options import Device, Merge, Model

if TYPE_CHECKING:
    from allmend.pairing.folders import Applied


def apply(
    model: Model,
    plan: Annotated[Path, typer.Option(help="plan.json of `allmend depth search`, or one of your own.")],
    out: Annotated[Path, typer.Option(help="A folder that is not there yet.")],
    merge: Merge = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fold a plan into a model folder that loads with from_pretrained.

    What a search has found:  allmend depth apply MODEL --plan found/plan.json --out paired
    """
    from allmend.pairing.folders import apply_folder

    found = apply_folder(model, plan, out, merge=merge, device=device or None)
    if as_json:
        print_json(found)
        return
    show_applied(Console(), found)


def show_applied(console: Console, found: "Applied") -> None:
    """Print what was written, and how it loads."""
    now, before = found.parameters
    console.print(
        f"{found.architecture}: {found.depth} steps instead of {found.layers}, {now:,} parameters instead of "
        f"{before:,}.",
        highlight=False,
    )
    console.print(
        "It loads with AutoModelForCausalLM.from_pretrained: after `import allmend`, or with trust_remote_code=True.",
        highlight=False,
    )
    console.print(f"Model   {escape(str(found.out.resolve()))}", highlight=False, soft_wrap=True)
