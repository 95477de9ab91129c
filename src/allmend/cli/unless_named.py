"""A group of commands one of which is meant where none is named."""

from typing import Any

from typer.core import TyperGroup


class RunUnlessNamed(TyperGroup):
    """`allmend audit RUN` is `allmend audit run RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's, with the command `run` in front of what is no command."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)
