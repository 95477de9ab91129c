"""`allmend coordinate`: a run among organisations, at the coordinator."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console

from allmend.cli.as_json import EventLines, told
from allmend.cli.outcome import show_outcome

if TYPE_CHECKING:
    from allmend.federation.engines.flower.exchange import Exchange

    OpenExchange: TypeAlias = Callable[[Path], contextlib.AbstractContextManager[Exchange]]


def coordinate(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML). Its clients are the registered members.")],
    members: Annotated[Path, typer.Option(help="Registered members: names and public keys (TOML).")],
    listen: Annotated[str, typer.Option(help="Where members reach this machine: HOST:PORT.")] = "0.0.0.0:8443",
    pki: Annotated[Path, typer.Option(help="Folder of the certificates (`allmend pki init`).")] = Path("pki"),
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain HTTP, on this machine's own addresses only: to try it out.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME when absent.")] = None,
    fewest: Annotated[int, typer.Option(help="Members that must join, and answer in each round.")] = 2,
    join_within: Annotated[float, typer.Option(help="Seconds to wait for members to join.")] = 3600.0,
    answer_within: Annotated[float, typer.Option(help="Seconds that a member has for its part of a round.")] = 3600.0,
    as_json: EventLines = False,
) -> None:
    """Adapt a model together with members on other machines.

    Started again with the same arguments, it goes on where it stopped.

    Over TLS, with the certificates of `allmend pki init`:  allmend coordinate recipe.toml --members members.toml

    To try it on one machine:  allmend coordinate recipe.toml --members members.toml --listen 127.0.0.1:8443
    """
    from allmend.federation.engines.flower import check_installed

    check_installed()
    from allmend.consortium import coordinator
    from allmend.consortium.gathering import Patience
    from allmend.federation.keys import read_members
    from allmend.recipe import load_recipe, located

    console = Console(quiet=as_json)
    loaded = load_recipe(recipe, members=list(read_members(members)))
    folder = out or Path("runs") / loaded.name
    registered, open_exchange = door(console, members, listen, pki, insecure=insecure)
    with (
        located(recipe),
        told(console, as_json=as_json, onward="the same command goes on with it.", run=folder) as listen_to,
    ):
        run = coordinator.coordinate(
            loaded,
            registered,
            folder,
            base=recipe.parent,
            open_exchange=open_exchange,
            patience=Patience(join=join_within, leg=answer_within, fewest=fewest),
            listeners=[listen_to],
        )
    if not as_json:
        show_outcome(console, run)


def door(
    console: Console, members: Path, listen: str, pki: Path, *, insecure: bool
) -> tuple[dict[str, bytes], "OpenExchange"]:
    """The registered members, and what opens the coordinator's door to them.

    Raises:
        UserError: Flower is not installed, a file cannot be read, or the address is taken.
    """
    from allmend.federation.engines.flower import check_installed

    check_installed()
    from allmend.consortium.coordinator_end import open_door
    from allmend.federation.engines.flower.door import Listen, address, check_free
    from allmend.federation.keys import fingerprint, read_members
    from allmend.federation.pki import Files

    registered = read_members(members)
    host, port = address(listen)
    check_free(host, port)  # before there is a folder of a run that could not begin
    files = Files(pki)
    where = Listen(host, port) if insecure else Listen(host, port, files.server, files.server_key)
    for name, key in registered.items():
        console.print(f"Member  {name}  {fingerprint(key)}", highlight=False, soft_wrap=True)
    return registered, partial(
        open_door,
        members=registered,
        listen=where,
        on_open=lambda port: console.print(f"Door    {host}:{port}", highlight=False),
    )
