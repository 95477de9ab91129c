"""A tiny federation with canaries, every layer in an arm of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from allmend import life
from allmend.models.load import LoadedModel, load_model
from allmend.recipe import Recipe, make_recipe
from allmend.run import RunFolder

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="package")
def model(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="package")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for client in ("north", "south"):
        rows = [{"id": f"{client}{i}", "prompt": f"{client} {i}?", "response": f"It is {7 * i}."} for i in range(12)]
        (folder / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="package")
def make(tiny_folder: Path) -> MakeRecipe:
    def build(**sections: object) -> Recipe:
        return make_recipe(
            {
                "seed": 3,
                "model": {"source": str(tiny_folder)},
                "data": {"held_out": 0.3, "max_tokens": 300},
                "clients": [{"name": name, "data": f"{name}.jsonl"} for name in ("north", "south")],
                "adapter": {"rank": 2},
                "train": {"learning_rate": 0.01, "batch_size": 4},
                "strategy": {"name": "fedavg", "rounds": 2},
                "canaries": {"copies": [1, 3], "count": 3},
                "audit": {"prefix_tokens": [20], "exposure": ["ward"], "membership_records": 2},
            }
            | sections
        )

    return build


@pytest.fixture(scope="package")
def run(workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """With every layer in an arm of its own, and what each party sees."""
    recipe = make(
        compare={
            "goldfish": {"privacy": {"goldfish": {}}},
            "once": {"privacy": {"deduplicate": {}}},
            "private": {"privacy": {"record": {"epsilon": 8.0, "delta": 0.01}}},
        },
        audit={"prefix_tokens": [20], "exposure": ["ward"], "membership_records": 2, "views": True},
    )
    return life.tune(recipe, tmp_path_factory.mktemp("runs") / "run", base=workplace, model=model)
