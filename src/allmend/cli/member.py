"""`allmend member`: the key that a member is known by."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from allmend.errors import UserError

app = typer.Typer(help="A member's identity.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `key` a sub-command although it is the only one."""


@app.command()
def key(
    out: Annotated[Path | None, typer.Option(help="Where to write a new private key; nothing is overwritten.")] = None,
    public: Annotated[
        Path | None, typer.Option(help="A private key: print the public one, for the coordinator.")
    ] = None,
) -> None:
    """Make a private key, or show the public key of one.

    A new one:                allmend member key --out me.key

    Its public line:          allmend member key --public me.key

    The private key stays with the member. The coordinator registers the public one.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from allmend.federation.keys import dump_key, fingerprint, public_line, read_key
    from allmend.run import write_atomic

    if public is not None:
        if out is not None:
            raise UserError("--out is for a new key, --public for one that is there", hint="Give one of them.")
        raw = read_key(public).public_key().public_bytes_raw()
        print(public_line(raw))
        typer.echo(f"Fingerprint  {fingerprint(raw)}", err=True)
        return
    made = Ed25519PrivateKey.generate()
    if out is None:
        if sys.stdout.isatty():
            raise UserError(
                "a private key does not belong on a screen", hint="Name a file: allmend member key --out me.key"
            )
        print(dump_key(made).decode(), end="")
        return
    if out.exists():
        raise UserError(
            "a file is here already", where=out, hint="A lost key cannot be made again: choose another name."
        )
    write_atomic(out, dump_key(made), mode=0o600)
    raw = made.public_key().public_bytes_raw()
    print(public_line(raw))
    typer.echo(f"Private key  {out}\nFingerprint  {fingerprint(raw)}", err=True)
