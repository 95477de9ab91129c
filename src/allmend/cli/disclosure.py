"""What leaves each member, shown before a run."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from allmend.cli.progress import duration, size

if TYPE_CHECKING:
    from allmend.federation.privacy.ledger import Account
    from allmend.life import Disclosure
    from allmend.prepare import Prepared


_IN_SIGHT = "only summed"
_HIDDEN = "summed behind masks"
_MEANING = {
    _IN_SIGHT: "summed over members; only the sum is used, but whoever sums could see each",
    _HIDDEN: "summed over members so that nobody sees one (between machines; here masks are simulated)",
}


def show_disclosures(
    console: Console,
    prepared: "Prepared",
    disclosures: "Sequence[Disclosure]",
    *,
    work: Mapping[str, float],
    rate: float,
) -> None:
    """Print the clients' records and, for each arm, what leaves a member, who sees it and what stays.

    Args:
        console: where to.
        prepared: the run.
        disclosures: of its arms.
        work: its phases, in tokens read.
        rate: tokens that are read in a second here.
    """
    records = Table("client", "training", "+ canaries", "= learnt from", "held out", "notes", title="Records")
    for member in prepared.members:
        notes = ", ".join(f"{count:,} {what}" for what, count in prepared.notes[member.name].items())
        held_out = len(prepared.held_out[member.name])
        planted = sum(canary.copies for canary in prepared.canaries if canary.inserted and canary.client == member.name)
        own = len(member.records) - planted
        records.add_row(
            member.name, f"{own:,}", f"{planted:,}", f"{len(member.records):,}", f"{held_out:,}", notes or "none"
        )
    console.print(records)
    _show_identifiers(console, prepared)
    for disclosure in disclosures:
        table = Table(
            "what", "which", "size", "who sees it", title=f"Arm {disclosure.arm}: what leaves a member", show_lines=True
        )
        declaration = disclosure.declaration
        full = size(disclosure.message)
        hidden = disclosure.masked is not None
        for name, what in declaration.summed.items():
            table.add_row(
                name,
                what,
                "a number" if name in declaration.numbers else size(disclosure.sizes.get(name, 0)),
                _HIDDEN if hidden else _IN_SIGHT,
            )
        for name, why in declaration.seen.items():
            seen = f"seen by {declaration.seen_by} one by one"
            table.add_row(name, why, "a number" if name in declaration.numbers else full, seen)
        if declaration.kept:
            table.add_row("(stays)", declaration.kept, "", "the member alone")
        console.print(table)
        sent = (
            f"The coordinator sends {declaration.sent} ({size(disclosure.sent)})."
            if declaration.sent
            else "The coordinator sends nothing."
        )
        if disclosure.masked is not None:
            console.print(f"Behind masks, a member sends {size(disclosure.masked)} in all.", highlight=False)
        for words in disclosure.layers:
            console.print(f"{words[0].upper()}{words[1:]}.", highlight=False)
        for name, account in disclosure.ledger.accounts.items():
            console.print(guarantee(name, account), highlight=False)
        if disclosure.ledger.accounts and prepared.recipe.arms()[disclosure.arm].privacy.randomness == "seeded":
            console.print(
                "Noise and draws come from the recipe's seed: a simulation, without guarantee against whoever knows "
                'it. A guarantee needs privacy.randomness = "secure".',
                highlight=False,
            )
        where = " All records stand in one place: a simulation." if disclosure.simulated_only else ""
        console.print(f"{sent} {disclosure.trainable:,} parameters learn.{where}\n", highlight=False)
    used = {_HIDDEN if disclosure.masked is not None else _IN_SIGHT for disclosure in disclosures}
    for words in sorted(used):
        console.print(f"{words[0].upper()}{words[1:]}: {_MEANING[words]}.", highlight=False)
    seconds = {phase: tokens / rate for phase, tokens in work.items()}
    console.print(f"Work: {_times(seconds)}, at the speed that this machine has now.\n", highlight=False)
    _show_left_out(console, prepared, seconds)
    console.print("Everything fits; nothing was trained or written. All clients are simulated in this process.")
    for warning in prepared.warnings:
        console.print(f"[yellow]Warning[/yellow] {escape(warning)}", highlight=False)


def disclosed(prepared: "Prepared", disclosures: "Sequence[Disclosure]") -> dict[str, Any]:
    """The same for programs: sizes in bytes, ε after all rounds."""
    return {
        "members": [
            {
                "name": member.name,
                "training": len(member.records),
                "planted": sum(c.copies for c in prepared.canaries if c.inserted and c.client == member.name),
                "held_out": len(prepared.held_out[member.name]),
                "notes": dict(prepared.notes[member.name]),
            }
            for member in prepared.members
        ],
        "arms": [
            {
                "name": arm.arm,
                "trainable": arm.trainable,
                "sent": {"what": arm.declaration.sent, "bytes": arm.sent if arm.declaration.sent else 0},
                "summed": [
                    {"name": name, "what": what, "bytes": arm.sizes.get(name)}
                    for name, what in arm.declaration.summed.items()
                ],
                "behind_masks": arm.masked is not None,
                "masked_bytes": arm.masked,
                "layers": list(arm.layers),
                "seen": [{"name": name, "why": why} for name, why in arm.declaration.seen.items()],
                "seen_by": arm.declaration.seen_by if arm.declaration.seen else None,
                "kept": arm.declaration.kept,
                "guarantees": {
                    name: {"unit": account.unit, "epsilon": account.whole, "delta": account.settings.delta}
                    for name, account in arm.ledger.accounts.items()
                },
                "simulated_only": arm.simulated_only,
            }
            for arm in disclosures
        ],
        "warnings": list(prepared.warnings),
    }


def _show_identifiers(console: Console, prepared: "Prepared") -> None:
    """What looks like personal data in the training records: counts, and never the text."""
    from allmend.data.identifiers import count_identifiers

    found = {
        client: count_identifiers(text for record in records for text in record.texts)
        for client, records in prepared.train.items()
    }
    if not any(found.values()):
        console.print("Nothing in the training records has the form of personal data (names have none).\n")
        return
    table = Table("client", "found in training records", title="What looks like personal data")
    for client, counts in found.items():
        words = (f"{kind} {count:,}" for kind, count in counts.items())
        table.add_row(escape(client), ", ".join(words) or "nothing")
    console.print(table)


def _show_left_out(console: Console, prepared: "Prepared", seconds: Mapping[str, float]) -> None:
    """Arms whose clients' own models are not audited, and how to ask for them."""
    from allmend.check import audited, personal

    arms, known = prepared.recipe.arms(), audited(prepared.recipe)
    left = [name for name, arm in arms.items() if personal(arm) and name not in known]
    if not prepared.canaries or not left:
        return
    each = f", about {duration(seconds['audit base'] * len(prepared.members))} for each arm" * ("audit base" in seconds)
    every = ", ".join(f'"{name}"' for name in (*known, *left))
    console.print(
        f"Not audited: {', '.join(left)}. To audit clients' own models, name arms: "
        f"{escape(f'[audit] models = [{every}]')}. Each model costs as much as the base model's audit{each}.\n",
        highlight=False,
    )


def _times(seconds: Mapping[str, float]) -> str:
    """`about 9 min (training 6 min, evaluation 1 min, audit 2 min)`."""
    kinds = {"training": "train ", "evaluation": "evaluate ", "audit": "audit ", "influence": "influence "}
    parts = {
        kind: sum(spent for phase, spent in seconds.items() if phase.startswith(start)) for kind, start in kinds.items()
    }
    words = ", ".join(f"{kind} {duration(spent)}" for kind, spent in parts.items() if spent)
    return f"about {duration(sum(seconds.values()))} ({words})"


def guarantee(name: str, account: "Account") -> str:
    """One guarantee and what it costs over the whole run, in a sentence."""
    whose = "each client as a whole" if account.unit == "member" else f"each record of {name}"
    spent = account.whole
    cost = f"ε = {spent:.2f} at δ = {account.settings.delta:g}"
    if not math.isfinite(spent):
        cost = "no guarantee with so little noise" if account.release.noise_multiplier else "no guarantee without noise"
    return (
        f"For {whose}: {cost} after all rounds; clip {account.settings.clip:g}, noise multiplier "
        f"{account.release.noise_multiplier:.3g}; {account.sampling}."
        + (" Its training loss stays with it." if account.unit == "record" else "")
    )
