"""What is wrong with a recipe: at which key, in which line, in words for its author."""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias, get_args

from pydantic import BaseModel, ValidationError

from allmend.errors import UserError, listed

Key: TypeAlias = tuple[str | int, ...]
"""Where a value stands in a recipe: keys of tables, and indices in arrays."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: at which key, in which line of the file if known."""

    key: Key
    what: str
    line: int | None = None

    def __str__(self) -> str:
        # people count the elements of an array from 1
        key = ""
        for part in self.key:
            key += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if key else part
        key = key or "recipe"
        return f"{key}{f' (line {self.line})' if self.line else ''}: {self.what}"


class RecipeError(UserError):
    """All problems of a recipe at once."""

    def __init__(self, problems: Sequence[Problem], *, where: Path | None = None) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the recipe\n{listed(problems)}", where=where)

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        return partial(type(self), self.problems, where=Path(self.where) if self.where else None), ()


def problems_of(error: ValidationError, schema: type[BaseModel], prefix: Key = ()) -> list[Problem]:
    """What pydantic found, in our words.

    Args:
        error: from the schema, or from a part of it.
        schema: of the whole recipe, for keys that may have been meant.
        prefix: where the part stands.
    """
    problems: dict[Key, Problem] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "whole":
            return list(detail["ctx"]["problems"])  # only a recipe whose sections are valid is looked at as a whole
        message = _message(detail["type"], detail["msg"].removeprefix("Value error, "))
        if detail["type"] == "extra_forbidden":
            message += _near((*prefix[-1:], *detail["loc"]), schema)
        if detail["type"] != "extra_forbidden" and isinstance(given := detail["input"], str | int | float | bool):
            message += f", got {json.dumps(given, ensure_ascii=False)}"
        # a union reports one error for each of its members, under names that are no keys of the file
        key = tuple(part for part in detail["loc"] if not (isinstance(part, str) and _UNION.search(part)))
        whole = (*prefix, *key)
        if whole in problems:
            message = f"{problems[whole].what}; or {message}"
        problems[whole] = Problem(whole, message)
    # where one member of a union fails deeper than another, that is the one that was meant
    above = {key[:length] for key in problems for length in range(len(key))}
    return [problem for key, problem in problems.items() if key not in above]


_UNION = re.compile(r"[\[\](]|^(constrained-)?(int|str|float|bool)$")


def _near(key: Key, schema: type[BaseModel]) -> str:
    """The key that may have been meant."""
    section: Any = schema
    for part in key[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    close = difflib.get_close_matches(str(key[-1]), section.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _message(type: str, message: str) -> str:
    match type:
        case "extra_forbidden":
            return "there is no such key"
        case "missing":
            return "is missing"
        case "int_type":
            return "must be a whole number, without quotes"
        case "float_type":
            return "must be a number, without quotes"
        case "string_type":
            return "must be text, in quotes"
        case "model_type" | "dict_type":
            return "must be a table"
        case "string_pattern_mismatch":
            return "must be at most 64 letters, digits, dots, dashes and underscores, a letter or digit first"
    return f"{message[0].lower()}{message[1:]}".replace("input should be", "must be")
