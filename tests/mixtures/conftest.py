"""A run of three clients with mixtures: two specialists, one, and none."""

import json
from pathlib import Path
from typing import Any

import pytest

from allmend import make_recipe, tune
from allmend.recipe import Recipe
from allmend.run import RunFolder

NAMES = ("east", "north", "south")


def made(folder: Path, **sections: Any) -> Recipe:
    return make_recipe(
        {
            "model": {"source": str(folder)},
            "data": {"held_out": 0.3},
            "clients": [
                {"name": name, "data": f"{name}.jsonl", "specialists": 2 - place} for place, name in enumerate(NAMES)
            ],
            "adapter": {"kind": "mixture", "rank": 2, "specialists": 2},
            "train": {"learning_rate": 0.02, "batch_size": 4},
            "strategy": {"name": "comigs", "rounds": 2, "router_every": 2, "router_steps": 3, "router_lr": 0.1},
        }
        | sections
    )


def write_records(folder: Path) -> None:
    for place, name in enumerate(NAMES):
        rows = [{"id": f"{name}{i}", "prompt": f"{name} {i}?", "response": f"{7 * i + place}"} for i in range(18)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("work")
    write_records(folder)
    compare = {"alone": {"strategy": {"name": "local"}, "adapter": {"kind": "lora", "rank": 2}}}
    return tune(made(tiny_folder, compare=compare), folder / "run", base=folder)
