"""`allmend tune`: carry out a recipe, or go on with a run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from allmend.cli.as_json import EventLines, print_json, told
from allmend.cli.disclosure import disclosed, show_disclosures
from allmend.cli.outcome import show_outcome
from allmend.cli.progress import resume_with
from allmend.cli.tensorboard import board
from allmend.errors import UserError


def tune(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (TOML); see `allmend recipe init`.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME when absent.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show what would leave whom; train nothing.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write RUN/tensorboard too.")] = False,
    as_json: EventLines = False,
) -> None:
    """Adapt a model together: train, evaluate, audit and report as the recipe says.

    See first what would leave whom:  allmend tune recipe.toml --dry-run

    Carry it out, in runs/NAME:       allmend tune recipe.toml

    Go on after any interruption:     allmend tune --resume runs/NAME
    """
    from allmend import life
    from allmend.recipe import load_recipe, located
    from allmend.workload import reading_rate, work_ahead

    console = Console()
    if (recipe is None) == (resume is None):
        raise UserError("give either a recipe or --resume RUN", where="allmend tune")
    if resume is not None:
        if out is not None or dry_run:
            raise UserError("--resume goes with neither --out nor --dry-run", where="allmend tune")
        with (
            told(console, as_json=as_json, onward=resume_with(resume), run=resume) as listen,
            board(resume, wanted=tensorboard) as more,
        ):
            run = life.resume(resume, listeners=[listen, *more])
        if not as_json:
            show_outcome(console, run)
        return
    assert recipe is not None
    loaded = load_recipe(recipe)
    folder = out or Path("runs") / loaded.name
    with located(recipe):
        if dry_run:
            found = life.rehearse(loaded, recipe.parent)
            if as_json:
                print_json(disclosed(*found))
            else:
                work, rate = work_ahead(found[0]), reading_rate(found[0])
                show_disclosures(console, *found, work=work, rate=rate)
            return
        with (
            told(console, as_json=as_json, onward=resume_with(folder), run=folder) as listen,
            board(folder, wanted=tensorboard) as more,
        ):
            run = life.tune(loaded, folder, base=recipe.parent, listeners=[listen, *more])
    if not as_json:
        show_outcome(console, run)
