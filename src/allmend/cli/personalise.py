"""`allmend personalise`: a model for each member, and whether that paid."""

import typer

from allmend.cli import personalise_compare, personalise_export

app = typer.Typer(
    help="A model for each member: what it is worth beside training alone.",
    no_args_is_help=True,
)
app.command("compare")(personalise_compare.compare)
app.command("export")(personalise_export.export)
