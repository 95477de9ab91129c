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
    optimizer: Annotated[str | None, typer.Option(help="train.optimizer, otherwise than in the recipe.")] = None,
    optimizer_state: Annotated[
        str | None, typer.Option(help="train.optimizer_state: reset, persist or ramp.", show_default=False)
    ] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="train.warmup_steps.")] = None,
    log_updates: Annotated[
        bool, typer.Option("--log-updates", help="Log how large steps are, for `allmend optim inspect`.")
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
    given = {"optimizer": optimizer, "optimizer_state": optimizer_state, "warmup_steps": warmup}
    changed = {key: value for key, value in given.items() if value is not None}
    changed |= {"log_updates": True} if log_updates else {}
    if resume is not None:
        if out is not None or dry_run or changed:
            raise UserError(
                "--resume goes on with the run as it was begun, and takes no other option", where="allmend tune"
            )
        with (
            told(console, as_json=as_json, onward=resume_with(resume), run=resume) as listen,
            board(resume, wanted=tensorboard) as more,
        ):
            run = life.resume(resume, listeners=[listen, *more])
        if not as_json:
            show_outcome(console, run)
        return
    assert recipe is not None
    loaded = load_recipe(recipe, train=changed)
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
