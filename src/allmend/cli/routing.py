"""`allmend routing RUN`: who answers in members' mixtures, the experts that all share or those of one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from allmend.cli.as_json import AsJson, print_json
from allmend.cli.figures import ABSENT, plain, show_sections
from allmend.errors import UserError

if TYPE_CHECKING:
    from allmend.report.routed_text import RoutedText
    from allmend.results import ArmRouting, MemberRouting

_STRIP = "layer by layer"
BARS = "▁▂▃▄▅▆▇█"
FIGURES = {"generalists": 19, "lowest": 9, "highest": 9}
"""Columns between a client's name and its layers."""


def routing(
    run: Annotated[str, typer.Argument(help="A run folder, or RUN:ARM.", metavar="RUN[:ARM]")],
    member: Annotated[str | None, typer.Option(help="This client alone, with each of its experts.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text, whose every token is shown with its weight.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="This layer alone; the mean over layers if absent.")] = None,
    svg: Annotated[Path | None, typer.Option(help="A file for the heat map, or for the coloured text.")] = None,
    html: Annotated[Path | None, typer.Option(help="A file for the same as a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how much weight routers give to the generalists, which all clients share, layer by layer.

    On the clients' held-out records:  allmend routing runs/first --svg routing.svg

    On a text, token by token:         allmend routing runs/first --text note.txt --html note.html

    With --text, RUN may also be the folder of a mixture.
    """
    if text is None:
        _records(run, member, layer, svg, html, as_json=as_json)
    else:
        _text(run, member, text, layer, svg, html, as_json=as_json)


def _records(
    run: str, member: str | None, layer: int | None, svg: Path | None, html: Path | None, *, as_json: bool
) -> None:
    from allmend.mixtures.routing import read_routing
    from allmend.report.picture import picture
    from allmend.report.routing_page import write_routing_page
    from allmend.report.sections.routing import expert_map, routing_map
    from allmend.run import run_and_arm, write_atomic

    named, arm = run_and_arm(run)
    found = read_routing(named.path, arm or None)
    if layer is not None and layer not in found.layers:
        hint = f"Layers that do: {found.layers[0]} to {found.layers[-1]}." if found.layers else ""
        raise UserError(f"layer {layer} has no experts", where="--layer", hint=hint)
    one = next((known for known in found.members if known.member == member), None)
    if member is not None and one is None:
        hint = f"Clients that do: {', '.join(known.member for known in found.members)}."
        raise UserError(f"no client {member!r} has a mixture here", where="--member", hint=hint)
    if not found.members:
        raise UserError("no client has a record to read", where=named.path, hint="Name a text with --text.")
    if svg is not None:
        drawn = routing_map(found) if one is None else expert_map(one, found.layers)
        write_atomic(svg, picture([drawn], titles=["Who answers" if one is None else one.member]).encode())
    if html is not None:
        write_routing_page(html, found, run=named.path.name)
    if as_json:
        print_json(found if one is None else one)
        return
    console = Console()
    if one is None:
        show_routing(console, found, layer)
    else:
        _show_experts(console, found, one, layer)
    _written(console, Map=svg, Page=html)


def _text(
    run: str, member: str | None, text: Path, layer: int | None, svg: Path | None, html: Path | None, *, as_json: bool
) -> None:
    from allmend.data.windows import read_text
    from allmend.mixtures.coloured import coloured
    from allmend.report.routed_text import text_picture, write_text_page
    from allmend.run import run_and_arm, write_atomic

    named, arm = run_and_arm(run)
    texts = coloured(named.path, read_text(text), arm=arm or None, member=member, layer=layer)
    if svg is not None:
        write_atomic(svg, text_picture(texts).encode())
    if html is not None:
        write_text_page(html, texts, of=text.name, whose=named.path.name)
    if as_json:
        print_json(texts)
        return
    console = Console()
    for one in texts:
        show_text(console, one)
    _written(console, Picture=svg, Page=html)


def _written(console: Console, **paths: Path | None) -> None:
    for what, path in paths.items():
        if path is not None:
            console.print(f"{what:<7} {escape(str(path.resolve()))}", highlight=False, soft_wrap=True)


def show_routing(console: Console, arm: "ArmRouting", layer: int | None = None) -> None:
    """Print a line for each client: the weight of the generalists, and how it goes through the layers."""
    from allmend.report.sections.routing import ends_of, read_in_words

    taken = sum(FIGURES.values()) + len(FIGURES) + 1
    longest = min(max(6, *(len(member.member) for member in arm.members)), console.width - taken - len(_STRIP))
    columns = {"client": longest} | FIGURES
    room = console.width - longest - taken
    rows = []
    for member in arm.members:
        shown = member.overall if layer is None else member.mass[arm.layers.index(layer)]
        ends = [f"{member.mass[place].value:.2f} ({arm.layers[place]})" for place in ends_of(member)]
        bars = strip([mass.value for mass in member.mass], room)
        # without a router all the weight is on the one expert
        rows.append((escape(member.member), plain(shown), *(ends if member.routed else (ABSENT, ABSENT)), bars))
    columns[_STRIP] = max(len(_STRIP), *(len(row[-1]) for row in rows))
    where = "mean over layers" if layer is None else f"layer {layer}"
    show_sections(console, f"Weight of the generalists in {arm.arm} ({where})", columns, {"": rows})
    console.print(
        f"{read_in_words(arm.members)} From 0, where specialists answer, to 1; the layer is in brackets.",
        highlight=False,
        style="dim",
    )
    for warning in arm.warnings:
        console.print(f"Warning: {escape(warning)}", highlight=False, style="yellow")


def _show_experts(console: Console, arm: "ArmRouting", member: "MemberRouting", layer: int | None) -> None:
    from allmend.report.sections.routing import experts_of, read_in_words

    names = experts_of(member)
    columns = {"layer": 6, "generalists": 19} | dict.fromkeys(names, 12)
    rows = [
        (str(number), plain(mass), *(f"{gate:.2f}" for gate in gates))
        for number, mass, gates in zip(arm.layers, member.mass, member.gates, strict=True)
        if layer in (None, number)
    ]
    show_sections(console, f"Weight of {member.member}'s experts in {arm.arm}", columns, {"": rows})
    console.print(read_in_words([member]), highlight=False, style="dim")


def strip(values: Sequence[float], room: int) -> str:
    """Values in [0, 1] as a row of bars; where there are more values than room, neighbours are averaged."""
    count = min(room, len(values))
    shown = []
    for place in range(count):
        some = values[place * len(values) // count : (place + 1) * len(values) // count]
        shown.append(BARS[min(len(BARS) - 1, int(sum(some) / len(some) * len(BARS)))])
    return "".join(shown)


def show_text(console: Console, text: "RoutedText") -> None:
    """Print a text with each token on blue, where the generalists answer, or on orange, where specialists do."""
    from allmend.report.routed_text import in_words, shades_of

    colours = shades_of([text])
    console.print(f"\n[bold]{escape(text.title)}[/bold]", highlight=False)
    shown = Text()
    for piece in text.pieces:
        strength = colours.strength(piece.mass)
        red, green, blue = (229, 138, 60) if piece.mass < colours.zero else (91, 155, 213)
        on = ";".join(str(round(250 + (end - 250) * strength)) for end in (red, green, blue))
        shown.append(piece.text, style=f"black on rgb({on.replace(';', ',')})")
    console.print(shown)
    console.print(in_words(text), highlight=False, style="dim")
