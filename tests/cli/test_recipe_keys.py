"""The keys of a recipe in words: each is there, with the default that a recipe has."""

import tomllib
from typing import Any

from typer.testing import CliRunner

from allmend.cli import app
from allmend.cli.recipe_keys import recipe_keys
from allmend.recipe import Recipe, make_recipe

CLIENTS = [{"name": "north", "data": "north.jsonl"}]


def leaves(schema: dict[str, Any], whole: dict[str, Any]) -> int:
    """Keys of a JSON Schema that hold values, counted without a look at pydantic's fields."""
    count = 0
    for value in schema["properties"].values():
        options = [value, *value.get("anyOf", ()), value.get("items", {}), *value.get("patternProperties", {}).values()]
        refs = {option["$ref"] for option in options if isinstance(option, dict) and "$ref" in option}
        count += sum(leaves(whole["$defs"][ref.removeprefix("#/$defs/")], whole) for ref in refs) or 1
    return count


def test_every_key_is_there_once_and_means_something() -> None:
    keys = list(recipe_keys())
    schema = Recipe.model_json_schema()
    assert len({(key.section, key.name) for key in keys}) == len(keys) == leaves(schema, schema)
    assert all(len(key.meaning) > 5 for key in keys)


def test_defaults_are_those_of_a_recipe() -> None:
    """Written out, they change nothing."""
    tables: dict[str, list[str]] = {}
    parts = ("privacy", "compare", "canaries", "clients", "influence")  # absent unless they are named
    for key in recipe_keys():
        if key.default not in ("absent", "required") and key.part not in parts:
            tables.setdefault(key.section, []).append(f"{key.name} = {key.default}")
    text = "\n".join("\n".join((section, *lines)) for section, lines in tables.items() if "icd10cm" not in section)
    plain = make_recipe({"clients": CLIENTS})
    assert make_recipe(tomllib.loads(text) | {"clients": CLIENTS}) == plain


def test_a_section_s_own_keys_come_before_the_sections_in_it() -> None:
    headings = list(dict.fromkeys(key.section for key in recipe_keys()))
    assert headings.index("[privacy]") < min(headings.index(one) for one in headings if one.startswith("[privacy."))


def test_the_command_shows_one_section_or_all() -> None:
    runner = CliRunner()
    one, every = (runner.invoke(app, ["recipe", "keys", *words]) for words in (["train"], []))
    assert one.exit_code == every.exit_code == 0
    assert "learning_rate" in one.stdout
    assert "[audit]" not in one.stdout
    assert "[audit]" in every.stdout
    assert "[privacy.record]" in every.stdout
