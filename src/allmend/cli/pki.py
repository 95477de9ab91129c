"""`allmend pki`: certificates for the coordinator's door."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

app = typer.Typer(help="Certificates for the coordinator.", no_args_is_help=True)

Names = Annotated[
    list[str] | None, typer.Argument(help="Host names and IP addresses that members will use; localhost is in anyhow.")
]
Out = Annotated[Path, typer.Option(help="Folder of the certificates.")]
Days = Annotated[int, typer.Option(help="How long the server's certificate holds.")]


@app.command()
def init(names: Names = None, out: Out = Path("pki"), days: Days = 365) -> None:
    """Make an authority and the server's certificate."""
    from allmend.federation.pki import make_pki

    _show(make_pki(out, names or [], days=days), out)


@app.command()
def renew(names: Names = None, out: Out = Path("pki"), days: Days = 365) -> None:
    """Make a new server's certificate with the authority that is there; members keep their ca.pem."""
    from allmend.federation.pki import renew_server

    _show(renew_server(out, names or [], days=days), out)


def _show(made: "Certificate", out: Path) -> None:
    from allmend.federation.pki import Files

    files = Files(out)
    shown = Table.grid(padding=(0, 2))
    shown.add_row("For members", str(files.ca))
    shown.add_row("For the coordinator", f"{files.server}, {files.server_key}")
    shown.add_row("To be locked away", f"{files.ca_key} (signs the next server's certificate)")
    shown.add_row("Holds until", f"{made.not_valid_after_utc:%d %B %Y}")
    Console().print(shown, highlight=False)
