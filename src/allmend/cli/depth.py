"""`allmend depth`: which layers can run side by side, at what cost, and the model in which they do."""

import typer

from allmend.cli import depth_apply, depth_bench, depth_export, depth_scan, depth_search

app = typer.Typer(
    help="Run layers side by side: fewer steps one after the other, at a cost that is measured.",
    no_args_is_help=True,
)
app.command("scan")(depth_scan.scan)
app.command("search")(depth_search.search)
app.command("apply")(depth_apply.apply)
app.command("bench")(depth_bench.bench)
app.command("export")(depth_export.export)
