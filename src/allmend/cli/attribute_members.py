"""`allmend attribute RUN`: whose data helped, in a run that is finished."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.figures import percent, plain, show_sections
from allmend.cli.progress import counted, shown, size

if TYPE_CHECKING:
    from allmend.results import ArmInfluence, InfluenceByMember


def members(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    target: Annotated[
        Path | None, typer.Option(help="A file of records that matter; all clients' held-out records when absent.")
    ] = None,
    by_kind: Annotated[bool, typer.Option("--by-kind", help="A target for each label of the file's records.")] = False,
    arm: Annotated[list[str] | None, typer.Option(help="Arms to measure; all that can be when absent.")] = None,
    method: Annotated[str | None, typer.Option(help="gfim, datainf or hessian_free.")] = None,
    damping: Annotated[float | None, typer.Option(help="Times the mean eigenvalue of each block.")] = None,
    modules: Annotated[str | None, typer.Option(help="A regular expression for names of weights.")] = None,
    min_records: Annotated[
        int | None, typer.Option(help="Fewest records of a client whose curvature is summed.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of a record's gradient in the curvature.")] = None,
    reveal: Annotated[str | None, typer.Option(help="client_sums, or none.")] = None,
    registered: Annotated[
        Path | None, typer.Option("--members", help="Registered members (TOML), of a run among organisations.")
    ] = None,
    listen: Annotated[str, typer.Option(help="Where members reach this machine: HOST:PORT.")] = "0.0.0.0:8443",
    pki: Annotated[Path, typer.Option(help="Folder of the certificates (`allmend pki init`).")] = Path("pki"),
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain HTTP, on this machine's own addresses.")] = False,
    fewest: Annotated[int, typer.Option(help="Members that must join; three at least.")] = 3,
    join_within: Annotated[float, typer.Option(help="Seconds to wait for members to join.")] = 3600.0,
    answer_within: Annotated[float, typer.Option(help="Seconds that a member has for its part.")] = 3600.0,
    again: Annotated[
        bool, typer.Option("--again", help="Sum over other members or records than before, which shows a block.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say whose data helped: a line for each client, and for nobody a record of another.

    What was not named is as in the recipe's [influence].

    Of a simulation:  allmend attribute runs/NAME --target test.jsonl

    Among organisations members are asked anew, and join again:

    allmend attribute runs/NAME --target test.jsonl --members members.toml --listen 127.0.0.1:8443 --insecure
    """
    from allmend.attribution.runs import attribute_run

    changes: dict[str, Any] = {
        key: value
        for key, value in {
            "target": None if target is None else str(target.resolve()),
            "targets": "kind" if by_kind else None,
            "arms": arm or None,
            "method": method,
            "damping": damping,
            "modules": modules,
            "min_records": min_records,
            "clip": clip,
            "reveal": reveal,
        }.items()
        if value is not None
    }
    console = Console(quiet=as_json)
    with silent() if as_json else shown(console) as tell:
        if registered is None:
            found = attribute_run(run, changes=changes, listeners=[tell])
        else:
            from allmend.cli.coordinate import door
            from allmend.consortium.afterwards import attribute_members
            from allmend.consortium.gathering import Patience

            keys, open_exchange = door(console, registered, listen, pki, insecure=insecure)
            found = attribute_members(
                run,
                keys,
                changes=changes,
                open_exchange=open_exchange,
                patience=Patience(join=join_within, leg=answer_within, fewest=fewest),
                again=again,
                listeners=[tell],
            )
    if as_json:
        print_json(found)
        return
    show_by_member(Console(), found)
    console.print(f"Report  {escape(str((run / 'report.html').resolve()))}", highlight=False, soft_wrap=True)
    for page in sorted(run.glob("arms/*/influence/*/influence.html")):
        console.print(f"Client  {escape(str(page.resolve()))}", highlight=False, soft_wrap=True)


def show_by_member(console: Console, found: "InfluenceByMember") -> None:
    """Print, for each arm and target, a line for each member, and what travelled for it."""
    for arm in found.arms:
        _show_arm(console, arm)


def _show_arm(console: Console, arm: "ArmInfluence") -> None:
    of = "all clients' held-out records" if arm.target == "held_out" else escape(arm.target)
    title = f"Whose data helped {arm.arm} ({of}, {counted(arm.target_records, 'record')})"
    sections = {
        "" if len(arm.targets) == 1 else target: [
            (
                escape(one.client),
                plain(one.mean, "+.2f"),
                percent(one.below),
                f"{one.balance:+.2f}",
                f"{one.mean.n:,}",
            )
            for one in arm.told(target)
        ]
        for target in arm.targets
    }
    if arm.members:
        columns = {"client": 18, "mean score": 22, "below 0": 23, "balance": 7, "n": 5}
        show_sections(console, title, columns, sections)
        console.print(
            "A score above 0: training on the record lowers the target's loss. Means are in units of the mean absolute "
            "score of all these records. No order is shown between clients whose "
            "intervals overlap. Balance: sum of the scores over their absolute sum; near 0 they cancel, and a mean "
            'below 0 says "less than the others".',
            style="dim",
        )
    else:
        console.print(f"\n[bold]{escape(title)}[/bold]\nNothing is revealed: each client has its own scores alone.")
    if arm.silent:
        console.print(
            f"Fewer than {arm.min_records} records, and so nothing told: {escape(', '.join(arm.silent))}.",
            highlight=False,
        )
    if arm.clip is not None:
        console.print(
            f"{arm.clipped:,} of {arm.gradients:,} gradients, a record's of a factor each, were scaled down to norm "
            f"{arm.clip:g} for the curvature.",
            highlight=False,
        )
    legs = ", ".join(f"{leg.name} {size(leg.sent)} and {size(leg.received)}" for leg in arm.legs)
    console.print(f"To and from a client: {legs}.", highlight=False)
    if arm.hidden and arm.error is not None:
        console.print(
            f"Sums were formed behind masks; rounding for that moves directions by {arm.error:.0e} of their length.",
            highlight=False,
        )
