"""`allmend attribute`: which records, and whose, moved a model towards a target."""

from pathlib import Path
from typing import Any

import typer

from allmend.cli import (
    attribute_compare,
    attribute_inverse,
    attribute_members,
    attribute_mislabeled,
    attribute_run,
    attribute_select,
)
from allmend.cli.unless_named import RunUnlessNamed


class OfRunOrModel(RunUnlessNamed):
    """`allmend attribute RUN` is `allmend attribute members RUN`; of a model, `allmend attribute run MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's, with the command in front that a folder asks for, or what is said of it.

        Nothing is to be asked of a model without an adapter and training records.
        """
        of_model = any(one.partition("=")[0] in ("--adapter", "--train", "--help") for one in args)
        unnamed = bool(args) and not args[0].startswith("-") and args[0] not in self.commands
        if args and ((Path(args[0]) / "run.json").is_file() or (unnamed and not of_model)):
            args = ["members", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=OfRunOrModel,
    help="Which records moved a model, and whose. `allmend attribute MODEL` is short for `allmend attribute run "
    "MODEL`, and `allmend attribute RUN` for `allmend attribute members RUN`.",
    no_args_is_help=True,
)
app.command("run")(attribute_run.run)
app.command("members")(attribute_members.members)
app.command("mislabeled")(attribute_mislabeled.mislabeled)
app.command("select")(attribute_select.select)
app.command("compare")(attribute_compare.compare)
app.command("inverse")(attribute_inverse.inverse)
