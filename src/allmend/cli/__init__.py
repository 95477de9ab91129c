"""The command line: one thin file a command; all work is done by the library."""

import logging
import os
import signal
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

import allmend
from allmend.cli import (
    attribute,
    audit,
    collaborators,
    coordinate,
    demo,
    depth,
    doctor,
    join,
    member,
    model,
    optim,
    personalise,
    pki,
    privacy,
    recipe,
    report,
    routing,
    status,
    tune,
)
from allmend.errors import UserError

app = typer.Typer(
    help="Adapt an open language model together without pooling data, and learn what it memorised.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("tune")(tune.tune)
app.command("coordinate")(coordinate.coordinate)
app.command("join")(join.join)
app.command("collaborators")(collaborators.collaborators)
app.command("routing")(routing.routing)
app.command("status")(status.status)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.add_typer(audit.app, name="audit")
app.add_typer(attribute.app, name="attribute")
app.add_typer(depth.app, name="depth")
app.add_typer(personalise.app, name="personalise")
app.add_typer(privacy.app, name="privacy")
app.add_typer(optim.app, name="optim")
app.add_typer(recipe.app, name="recipe")
app.add_typer(model.app, name="model")
app.add_typer(pki.app, name="pki")
app.add_typer(member.app, name="member")


def _version(value: bool) -> None:
    if value:
        print(f"allmend {allmend.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log.")] = False,
) -> None:
    if not verbose:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry; our message says why
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def main() -> None:
    """Run the command line. Exit status: 0 done, 2 the user's mistake or a fault to mend, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when worker processes start
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run says that it was stopped
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(Text.assemble(("Error", "bold red"), " ", str(error)), soft_wrap=True)
        sys.exit(2)
