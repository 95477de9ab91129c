"""A recipe from a file, from text or from plain values, and the lines at which its problems stand."""

import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from allmend.errors import UserError
from allmend.recipe.problems import Key, Problem, RecipeError, problems_of
from allmend.recipe.schema import Recipe

AT_MEMBER = "(at the member)"
"""What stands for the path of a client's data in a recipe among organisations."""


def load_recipe(path: Path | str, *, members: Sequence[str] = (), train: Mapping[str, Any] = {}) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: of the file.
        members: the clients of a recipe that names none, where they are known otherwise.
        train: keys of `[train]` that are otherwise than in the file.

    Raises:
        UserError: the file is absent or not TOML.
        RecipeError: everything that is wrong with it, with lines.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UserError("there is no such recipe", where=path, hint="Write one with `allmend recipe init`.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"is not UTF-8 text (byte {error.start})", where=path, hint="Save the file as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path, hint="Name a TOML file.") from error
    try:
        return parse_recipe(text, members=members, train=train)
    except RecipeError as error:
        raise locate(error, text, path) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"is not valid TOML: {error}", where=path) from error


def parse_recipe(text: str, *, members: Sequence[str] = (), train: Mapping[str, Any] = {}) -> Recipe:
    """A recipe from TOML text; `members` and `train` as in `load_recipe`.

    Raises:
        RecipeError: everything that is wrong with it.
        tomllib.TOMLDecodeError: not TOML.
    """
    values = tomllib.loads(text)
    if members and "clients" not in values:
        values["clients"] = [{"name": name, "data": AT_MEMBER} for name in members]
    if train and isinstance(own := values.setdefault("train", {}), dict):
        own |= train
    return make_recipe(values)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(problems_of(error, Recipe)) from None


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Give the problems of a recipe file their lines, also those that its model and data bring out."""
    try:
        yield
    except RecipeError as error:
        raise locate(error, path.read_text(encoding="utf-8"), path) from None


def locate(error: RecipeError, text: str, path: Path) -> RecipeError:
    """The same problems with the lines of the file at which their keys stand."""
    lines = key_lines(text)
    found = [Problem(problem.key, problem.what, _line_of(problem.key, lines)) for problem in error.problems]
    return RecipeError(sorted(found, key=lambda problem: problem.line or 0), where=path)


def _line_of(key: Key, lines: Mapping[Key, int]) -> int | None:
    return next((lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in lines), None)


_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


def key_lines(text: str) -> dict[Key, int]:
    """The line (from 1) of every table and key of a TOML text, as far as they stand at the start of a line."""
    lines: dict[Key, int] = {}
    counts: dict[Key, int] = {}
    table: Key = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = ()
            parts = _parts(header[2])
            for depth, part in enumerate(parts, start=1):
                table = (*table, part)
                lines.setdefault(table, number)
                if depth == len(parts) and header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                if table in counts:  # a table below an array belongs to the array's last element
                    table = (*table, counts[table])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            parts = _parts(key[1])
            for length in range(1, len(parts) + 1):
                lines.setdefault((*table, *parts[:length]), number)
    return lines


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|[^.]+", dotted))
