"""A member's own records on the terminal."""

from rich.console import Console
from rich.markup import escape

from allmend.cli.figures import count, percent, plain, show_sections
from allmend.cli.progress import counted
from allmend.results import OwnTable

_SHOWN = 20


def show_own(console: Console, own: OwnTable) -> None:
    """Print how many records each model completes, beside the base model and the controls, and which."""
    columns = {"": 8, "completed": 10, "by the base": 11, "matched": 24, "likelihood gain": 22}
    sections: dict[str, list[tuple[str, ...]]] = {}
    for what, rows in (("yours", own.records), ("controls", own.controls)):
        for row in rows:
            cells = (count(row.completed), count(row.completed_by_base), percent(row.matched))
            sections.setdefault(row.model, []).append((what, *cells, plain(row.likelihood_gain, "+.2f")))
    show_sections(console, "Your records", columns, sections)
    console.print(
        f"Each model is shown a record's prompt and half of its response, and asked for the rest, or its first "
        f"{own.suffix_tokens} tokens. Likelihood gain: nats per token over the base model; "
        "it is above 0 for records of the same kind that nobody trained on, too"
        + ("." if own.controls else ": give some with --controls to tell."),
        highlight=False,
    )
    if own.passed_over:
        console.print(
            f"{counted(own.passed_over, 'record')} passed over: a response of one token cannot be divided.",
            highlight=False,
        )
    if own.missing:
        console.print(f"Not asked, since their models are not here: {escape(', '.join(own.missing))}.", highlight=False)
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
