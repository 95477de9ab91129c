"""Writes the tables of docs/recipe.md that say what the keys of a recipe are; what stands between them stays."""

import re
from pathlib import Path

from allmend.cli.recipe_keys import RecipeKey, recipe_keys

PAGE = Path(__file__).parent / "recipe.md"

HEAD = "| key | values | default | meaning |\n| --- | --- | --- | --- |\n"


def written(page: str) -> str:
    """The page with its tables as they should be.

    Raises:
        ValueError: a section of the recipe has no heading with a table.
    """
    sections: dict[str, list[RecipeKey]] = {}
    for key in recipe_keys():
        sections.setdefault(key.section, []).append(key)
    for section, keys in sections.items():
        heading = re.escape(f"### `{section}`" if section else "### Top level")
        table = HEAD + "".join(f"{key.row}\n" for key in keys)
        page, found = re.subn(
            rf"(^{heading}\n(?:(?!#|\| key).*\n)*)\| key .*\n(?:\|.*\n)*",
            lambda match, table=table: match[1] + table,
            page,
            count=1,
            flags=re.MULTILINE,
        )
        if not found:
            raise ValueError(
                f"docs/recipe.md has no table under {section or 'Top level'}: write the heading ### `{section}` where "
                "it belongs, a sentence on what it is for, and the line | key | values | default | meaning |"
            )
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
