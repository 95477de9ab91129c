"""Every key of a recipe in words, from the types of `allmend.recipe` and from nothing else."""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from allmend.recipe import Recipe


@dataclass(frozen=True)
class RecipeKey:
    """A key of a recipe.

    Attributes:
        section: heading of the table that it stands in, such as `[train]`; empty at the top.
        name: the key.
        values: what it may hold, in words.
        default: as it would stand in the file; `required` or `absent` where there is none.
        meaning: what it is for.
    """

    section: str
    name: str
    values: str
    default: str
    meaning: str

    @property
    def part(self) -> str:
        """The first part of the section's name: `privacy` for `[privacy.goldfish]`."""
        return self.section.strip("[]").split(".")[0]

    @property
    def row(self) -> str:
        """A row of a Markdown table."""
        default = self.default if self.default in ("required", "absent") else f"`{self.default}`"
        return f"| `{self.name}` | {self.values} | {default} | {self.meaning} |"


def recipe_keys(model: type[BaseModel] = Recipe, section: str = "", prefix: str = "") -> Iterator[RecipeKey]:
    """All keys that hold values, section by section."""
    schema = Recipe.model_json_schema()
    properties = (schema if model is Recipe else schema["$defs"][model.__name__])["properties"]
    sections = []
    for name, field in model.model_fields.items():
        if found := _nested(prefix + name, field):
            sections.append((name, *found))
        else:
            meaning = " ".join((field.description or "").split()).rstrip(".")
            yield RecipeKey(section, name, _values(properties[name]), _default(field), meaning)
    for name, heading, inner in sections:  # after the section's own keys, as in a TOML file
        yield from recipe_keys(inner, heading, f"{prefix}{name}.")


def _nested(key: str, field: FieldInfo) -> tuple[str, type[BaseModel]] | None:
    """The heading and the model of a key that holds a table or tables."""
    for part in _parts(field.annotation):
        inner = [one for argument in get_args(part) for one in _parts(argument)]
        for form, candidates in (("[{}]", [part]), ("[[{}]]" if get_origin(part) is list else "[{}.NAME]", inner)):
            for model in candidates:
                if isinstance(model, type) and issubclass(model, BaseModel):
                    return form.format(key), model
    return None


def _parts(annotation: Any) -> list[Any]:
    """The members of a union but None, without `Annotated`."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _parts(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [part for one in get_args(annotation) if one is not type(None) for part in _parts(one)]
    return [annotation]


def _values(schema: dict[str, Any]) -> str:
    match schema:
        case {"anyOf": options}:
            return " or ".join(_values(option) for option in options if option.get("type") != "null")
        case {"enum": names}:
            return ", ".join(f'`"{name}"`' for name in names)
        case {"const": name}:
            return f'`"{name}"`'
        case {"type": "array", "items": items}:
            return f"list of {_values(items)}"
        case {"type": "string"}:
            return "name" if "pattern" in schema else "text"
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"type": "object"}:
            return "table"
        case {"type": "integer" | "number" as kind}:
            signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
            words = "whole number" if kind == "integer" else "number"
            bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if schema.get(key, 2**31) != 2**31]
            return f"{words} {' and '.join(bounds)}".rstrip()
    raise ValueError(f"no words for {schema}")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "absent" if field.default in (None, {}) else in_toml(field.default)


def in_toml(value: Any) -> str:
    """A value as it would stand in a recipe."""
    return " ".join(tomli_w.dumps({"x": value}).removeprefix("x = ").split()).replace("[ ", "[").replace(", ]", "]")
