"""`allmend demo`: the whole main job on a laptop, with a real model and real terminology."""

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from allmend.cli.as_json import EventLines, told
from allmend.cli.outcome import show_outcome
from allmend.cli.progress import resume_with
from allmend.cli.recipe import packaged


def demo(
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/demo when absent.")] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="About 20 minutes: train longer, compare full fine-tuning with LoRA.")
    ] = False,
    centralised: Annotated[
        bool, typer.Option("--centralised", help="Train on all records in one place too, as a further baseline.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of questions, canaries and order.")] = 0,
    as_json: EventLines = False,
) -> None:
    """Four clinics adapt a model to clinical coding without pooling data; a report says what came of it.

    Seven to eleven minutes on two cores, without a network once it is installed:  allmend demo

    With full fine-tuning beside LoRA, in about 20:  allmend demo --thorough
    """
    from allmend import life
    from allmend.recipe import Change, parse_recipe

    console = Console()
    text = packaged("thorough.toml" if thorough else "demo.toml")
    recipe = parse_recipe(text).model_copy(update={"seed": seed})
    if centralised:
        pooled = Change(strategy={"name": "centralised"})
        recipe = recipe.model_copy(update={"compare": {**recipe.compare, "centralised": pooled}})
    folder = out or _free(Path("runs") / recipe.name)
    with told(console, as_json=as_json, onward=resume_with(folder), run=folder) as listen:
        run = life.tune(recipe, folder, listeners=[listen])
    if not as_json:
        show_outcome(console, run)


def _free(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 … that is not there yet."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())
