"""Records of clients, and an adapter that was trained on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allmend import life
from allmend.recipe import make_recipe

ADAPTER = "run/arms/fedavg/adapter"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(client: str, count: int, answer: str = "") -> list[dict[str, Any]]:
    """Questions and answers, of two kinds in turns."""
    return [
        {
            "id": f"{client}-{i}",
            "prompt": f"{client} {i}?",
            "response": answer or f"It is {7 * i}.",
            "kind": "ab"[i % 2],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="package")
def adapt(tiny_folder: Path) -> Callable[..., None]:
    """Train an adapter on the files of a folder's clients, to `FOLDER/run`."""

    def run(folder: Path, *clients: str, rate: float, rounds: int) -> None:
        recipe = make_recipe(
            {
                "model": {"source": str(tiny_folder)},
                "data": {"held_out": 0.0, "template": "plain"},
                "clients": [{"name": name, "data": f"{name}.jsonl"} for name in clients],
                "adapter": {"rank": 2},
                "train": {"learning_rate": rate, "batch_size": 4},
                "strategy": {"name": "fedavg", "rounds": rounds},
            }
        )
        life.tune(recipe, folder / "run", base=folder)

    return run
