"""`allmend attribute mislabeled`: which records may be wrong."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.attribute_options import Cache, DropOverlap, Template, template_of
from allmend.cli.figures import percent, plain, show_sections
from allmend.cli.progress import shown

if TYPE_CHECKING:
    from allmend.attribution.review import Review

SHOWN = 20
"""Records shown."""


def mislabeled(
    model: Annotated[str, typer.Argument(help="The adapter's base: a folder, a Hub name, a GGUF file.")],
    adapter: Annotated[Path, typer.Option(help="A PEFT folder with a LoRA.")],
    train: Annotated[list[Path], typer.Option(help="Training records; each file counts as a client.")],
    target: Annotated[Path, typer.Option(help="Records that are known to be right.")],
    noisy: Annotated[
        str, typer.Option(help="A field of the training records that says which are wrong, to see what this is worth.")
    ] = "",
    method: Annotated[str, typer.Option(help="gfim, exact, datainf, lissa or hessian_free.")] = "gfim",
    damping: Annotated[float, typer.Option(help="Times the mean eigenvalue of each block.")] = 0.1,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest record, in tokens.")] = 512,
    template: Template = "auto",
    drop_overlap: DropOverlap = False,
    cache: Cache = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A JSON Lines file for the whole list; beside it a page with the records, the same name and .html."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rank training records by how likely they are wrong, with the loss and self-influence beside the influence.

    A list to review:  allmend attribute mislabeled MODEL --adapter DIR --train north.jsonl --target test.jsonl

    What it is worth:  allmend attribute mislabeled MODEL --adapter DIR --train a.jsonl --target b.jsonl --noisy bad
    """
    from allmend.attribution.review import page_of, review
    from allmend.attribution.settings import Settings

    settings = Settings(
        method=method,  # type: ignore[arg-type]  # checked there
        damping=damping,
        max_tokens=max_tokens,
        template=template_of(template),
        drop_overlap=drop_overlap,
        cache=cache,
    )
    with silent() if as_json else shown(Console()) as listen:
        found = review(
            model, adapter, train=train, target=target, noisy=noisy, out=out, settings=settings, listeners=[listen]
        )
    if as_json:
        print_json(found)
        return
    show_review(Console(), found)
    if out is not None:
        Console().print(f"Written to {escape(str(out))}", highlight=False, soft_wrap=True)
        Console().print(f"Report  {escape(str(page_of(out).resolve()))}", highlight=False, soft_wrap=True)


def show_review(console: Console, found: "Review") -> None:
    """Print the head of the list, and what each measure finds where labels say what is wrong."""
    columns = {"rank": 6, "record": 20, "client": 14, "influence": 11, "loss": 7, "self": 10, "": 6}
    head = [
        (
            str(one.rank),
            escape(one.record_id[:20]),
            escape(one.client[:14]),
            f"{one.influence:+.3g}",
            f"{one.loss:.2f}",
            f"{one.self_influence:.3g}",
            "" if one.wrong is None else "wrong" if one.wrong else "right",
        )
        for one in found.suspects[:SHOWN]
    ]
    show_sections(console, "To look at, the most suspicious first", columns, {"": head})
    console.print(
        "Influence: above 0 where training on the record raises the target's loss. Loss: nats a token. Self: influence "
        "of a record on its own loss.",
        style="dim",
    )
    if found.found:
        rows = [
            (
                name.removesuffix("_influence"),
                plain(one.auc),
                *(percent(one.recall[depth]) for depth in sorted(one.recall)[:2]),
            )
            for name, one in found.found.items()
        ]
        columns = {"measure": 9, "AUC": 19, "found in 10 %": 24, "in 20 %": 24}
        show_sections(console, "What each measure finds", columns, {"": rows})
    console.print(found.verdict, highlight=False)
    for note in found.notes:
        console.print(escape(note), highlight=False)
