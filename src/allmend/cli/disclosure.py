"""What leaves each member, shown before a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from allmend.cli.progress import size

if TYPE_CHECKING:
    from allmend.life import Disclosure
    from allmend.prepare import Prepared


def show_disclosures(console: Console, prepared: "Prepared", disclosures: "Sequence[Disclosure]") -> None:
    """Print the clients' records and, for each arm, what leaves a member, who sees it and what stays."""
    records = Table("client", "training", "canaries", "held out", "notes", title="Records")
    for member in prepared.members:
        notes = ", ".join(f"{count:,} {what}" for what, count in prepared.notes[member.name].items())
        held_out = len(prepared.held_out[member.name])
        planted = sum(canary.copies for canary in prepared.canaries if canary.inserted and canary.client == member.name)
        own = len(member.records) - planted
        records.add_row(member.name, f"{own:,}", f"{planted:,}", f"{held_out:,}", notes or "none")
    console.print(records)
    for disclosure in disclosures:
        table = Table(
            "what", "which", "size", "who sees it", title=f"Arm {disclosure.arm}: what leaves a member", show_lines=True
        )
        declaration = disclosure.declaration
        full = size(disclosure.message)
        for name, what in declaration.summed.items():
            table.add_row(
                name,
                what,
                "a number" if name in declaration.numbers else full,
                "summed over members; the strategy sees the sum only",
            )
        for name, why in declaration.seen.items():
            seen = f"seen by {declaration.seen_by} one by one"
            table.add_row(name, why, "a number" if name in declaration.numbers else full, seen)
        if declaration.kept:
            table.add_row("(stays)", declaration.kept, "", "the member alone")
        console.print(table)
        sent = (
            f"The coordinator sends {declaration.sent} ({full})."
            if declaration.sent
            else "The coordinator sends nothing."
        )
        where = " All records stand in one place: a simulation." if disclosure.simulated_only else ""
        console.print(f"{sent} {disclosure.trainable:,} parameters learn.{where}\n", highlight=False)
    console.print("Everything fits; nothing was trained or written. All clients are simulated in this process.")
