"""`allmend status`: how a run stands."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from allmend.cli.as_json import AsJson, print_json
from allmend.cli.progress import counted, duration, size
from allmend.errors import UserError

if TYPE_CHECKING:
    from allmend.status.standing import MemberStanding, Standing

MOST_WARNINGS = 5


def status(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    follow: Annotated[bool, typer.Option(help="Go on showing while somebody works on the run.")] = True,
    page: Annotated[
        int | None, typer.Option(help="Show the report and /metrics on this port of this machine; 0 for a free one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a run stands: rounds, members, bytes, warnings.

    On a terminal it follows the run until its end. It only reads, and may be started and stopped at any time.

    Follow a run:                                    allmend status runs/joint

    With its report and metrics in a browser:        allmend status runs/joint --page 9200

    Once, for a program:                             allmend status runs/joint --json
    """
    from allmend.run import RunFolder
    from allmend.status.page import StatusPage
    from allmend.status.standing import standing

    console, folder = Console(), RunFolder.open(run)
    if as_json:
        if page is not None:
            raise UserError("--json goes without --page", where="allmend status")
        print_json(standing(folder))
        return
    with ExitStack() as stack:
        if page is not None:
            served = stack.enter_context(StatusPage(folder.path, page))
            console.print(f"Page    {served.address}\nMetrics {served.address}metrics", highlight=False)
        if not (follow and (console.is_terminal or page is not None)):
            console.print(shown(standing(folder), now=time.time()))
            return
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while True:
            found = standing(folder)
            if live is not None:
                live.update(shown(found, now=time.time()), refresh=True)
            if found.state != "running" and page is None:
                return
            time.sleep(1.0)


def shown(standing: "Standing", *, now: float) -> RenderableType:
    """The standing as tables."""
    return Group(*_head(standing, now), _arms(standing), _members(standing, now), *_warnings(standing))


def _head(it: "Standing", now: float) -> list[RenderableType]:
    colour = {"running": "green", "finished": "green", "stopped": "yellow", "not running": "yellow"}[it.state]
    first = Text.assemble((it.run, "bold"), "  ", (it.state, colour))
    if it.phase:
        first.append(f"  {it.phase}")
    if it.state == "running" and it.latest is not None and now - it.latest > 1:
        first.append(f", last event {duration(now - it.latest)} ago", style="dim")
    lines: list[RenderableType] = [first]
    if it.state == "stopped":
        lines.append(Text(it.cause))
    if it.state == "not running":
        lines.append(Text("It has no end, and nobody works on it."))
    if it.onward:
        lines.append(Text(it.onward))
    if it.offer is not None:
        lines.append(Text(f"Offer  {it.offer}"))
    return lines


def _arms(it: "Standing") -> RenderableType:
    table = Table("arm", "strategy", "rounds", "loss", "a round", "left", "ε so far")
    for arm in it.arms:
        left = arm.seconds_left if it.state == "running" and arm.round < arm.rounds else None
        table.add_row(
            escape(arm.name),
            arm.strategy,
            f"{arm.round} of {arm.rounds}",
            "" if arm.loss is None else f"{arm.loss:.3f}",
            "" if arm.seconds is None else duration(arm.seconds),
            "" if left is None else f"about {duration(left)}",
            f"{max(arm.epsilon.values()):.2f}" if arm.epsilon else "",
        )
    return table if it.arms else Text("No arm has begun.")


def _members(it: "Standing", now: float) -> RenderableType:
    present = [_presence(member) for member in it.members]
    told = any(present)  # nobody is away in a simulation
    table = Table("member", "rounds", "last", "to it", "from it", *(["now"] if told else []))
    for member, now_at in zip(it.members, present, strict=True):
        table.add_row(
            escape(member.name),
            f"{member.rounds:,}",
            "" if member.last is None else f"{duration(max(0.0, now - member.last))} ago",
            size(member.sent) if member.sent else "",
            size(member.received) if member.received else "",
            *([now_at] if told else []),
        )
    return table if it.members else Text("No member is known yet.")


def _presence(member: "MemberStanding") -> Text:
    if member.away:
        return Text("away", style="yellow")
    return Text("is waited for" if member.waited_for else "", style="dim")


def _warnings(it: "Standing") -> list[RenderableType]:
    lines: list[RenderableType] = [
        Text.assemble(("Warning", "yellow"), f" {words}") for words in it.warnings[-MOST_WARNINGS:]
    ]
    if (more := len(it.warnings) - MOST_WARNINGS) > 0:
        lines.insert(0, Text(f"{counted(more, 'earlier warning')} in the report", style="dim"))
    return lines
