"""A member's own records on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from allmend.cli.figures import count, plain, share
from allmend.results import OwnTable

_SHOWN = 20


def show_own(console: Console, own: OwnTable) -> None:
    """Print how many records each model completes, beside the base model and the controls, and which."""
    table = Table(
        "model", "records", "completed", "by the base model", "matched", "likelihood gain", title="Your records"
    )
    for what, rows in (("yours", own.records), ("controls", own.controls)):
        for row in rows:
            table.add_row(
                escape(row.model),
                what,
                count(row.completed),
                count(row.completed_by_base),
                share(row.matched),
                plain(row.likelihood_gain, "+.2f"),
            )
    console.print(table)
    console.print(
        "Each model is shown a record's prompt and half of its response, and asked for the rest. Likelihood gain: nats "
        "per token over the base model; it is above 0 for records of the same kind that nobody trained on, too"
        + ("." if own.controls else ": give some with --controls to tell."),
        highlight=False,
    )
    for row in own.records:
        name = escape(row.model)
        if row.only_by_model:
            listed = escape(", ".join(row.only_by_model[:_SHOWN]))
            more = f" and {len(row.only_by_model) - _SHOWN} more" if len(row.only_by_model) > _SHOWN else ""
            console.print(
                f"[bold]{name} completes what the base model does not:[/bold] {listed}{more}", highlight=False
            )
        else:
            console.print(f"{name} completes none of your records that the base model does not.", highlight=False)
    console.print("That a record is not completed does not show that it is not memorised.", highlight=False)
