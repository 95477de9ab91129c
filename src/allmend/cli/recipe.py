"""`allmend recipe`: write a commented recipe, check one, export the schema."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from allmend.cli.as_json import AsJson, print_json
from allmend.errors import UserError

app = typer.Typer(help="Recipes: the TOML files that say everything about a run.", no_args_is_help=True)


def packaged(name: str) -> str:
    """The text of a recipe that comes with the package."""
    return (files("allmend.cli") / "recipes" / name).read_text(encoding="utf-8")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented recipe to start from."""
    from allmend.run import write_atomic

    if path.exists() and not force:
        raise UserError("there is a file already", where=path, hint="Choose another name, or replace it with --force.")
    write_atomic(path, packaged("template.toml").encode())
    Console().print(f"Recipe  {path}\nEdit it, then: allmend tune {path} --dry-run", highlight=False, soft_wrap=True)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A recipe.")],
    members: Annotated[
        Path | None, typer.Option(help="The registered members (TOML), who are the clients of a run between machines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say everything that is wrong with a recipe, its files, layers and strategy included.

    What only the data's content can show is found by `allmend tune RECIPE --dry-run`, which reads it.
    """
    from allmend.check import check as check_whole
    from allmend.consortium.offer import among
    from allmend.federation.keys import read_members
    from allmend.recipe import RecipeError, load_recipe, located

    try:
        names = sorted(read_members(members)) if members is not None else []
        recipe = load_recipe(path, members=names)
        with located(path):
            check_whole(among(recipe, names) if names else recipe, path.parent)
    except RecipeError as error:
        if as_json:
            print_json({"problems": error.problems})
        raise
    if as_json:
        print_json({"problems": []})
    else:
        Console().print(f"{path}: nothing is wrong with this recipe.", highlight=False, soft_wrap=True)


@app.command()
def keys(
    section: Annotated[str, typer.Argument(help="Of one section, such as `train` or `privacy`; all when absent.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show every key of a recipe: what it may hold, its default, and what it is for."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from allmend.cli.recipe_keys import recipe_keys

    found: dict[str, Table] = {}
    known = dict.fromkeys(key.part for key in recipe_keys())
    wanted = [key for key in recipe_keys() if section in ("", key.part, key.section.strip("[]"))]
    if not wanted:
        raise UserError(f"a recipe has no section {section!r}", hint=f"It has {', '.join(filter(None, known))}.")
    if as_json:
        print_json(wanted)
        return
    for key in wanted:
        title = escape(key.section) or "Top level"
        empty = Table("key", "default", "values", "meaning", title=title, title_justify="left", box=box.SIMPLE_HEAD)
        cells = (key.name, key.default, key.values, key.meaning)
        found.setdefault(key.section, empty).add_row(*(escape(cell.replace("`", "")) for cell in cells))
    for table in found.values():
        Console().print(table)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from allmend.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
