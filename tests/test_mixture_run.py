"""A run whose members have experts of their own: what is measured, what each leaves with, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend import load_model, make_recipe, tune
from allmend.errors import UserError
from allmend.life import rehearse, resume
from allmend.models.adapters import applied
from allmend.models.mixture import PRESENT, load_mixture, remove_mixture
from allmend.recipe import Recipe, RecipeError
from allmend.results import UtilityTable
from allmend.run import RunFolder

CLIENTS = ("north", "south")


def made(folder: Path, **sections: Any) -> Recipe:
    return make_recipe(
        {
            "model": {"source": str(folder)},
            "data": {"held_out": 0.2},
            "clients": [
                {"name": "north", "data": "north.jsonl", "specialists": 2},
                {"name": "south", "data": "south.jsonl"},
            ],
            "adapter": {"kind": "mixture", "rank": 2, "specialists": 2},
            "train": {"learning_rate": 0.01, "batch_size": 4},
            "strategy": {"name": "comigs", "rounds": 2, "router_every": 2, "router_steps": 1},
            "compare": {"local": {"strategy": {"name": "local"}, "adapter": {"kind": "lora", "rank": 4}}},
        }
        | sections
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for name in CLIENTS:
        rows = [{"id": f"{name}{i}", "prompt": f"{i}?", "response": f"{name} {7 * i}"} for i in range(15)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(workplace: Path, tiny_folder: Path) -> RunFolder:
    return tune(made(tiny_folder), workplace / "run", base=workplace)


def test_every_member_leaves_with_its_mixture(run: RunFolder, tiny_folder: Path) -> None:
    ids = torch.arange(20)[None]
    logits = []
    for name in CLIENTS:
        base = load_model(str(tiny_folder), device="cpu")
        mixture = load_mixture(base, run.arm("comigs") / "members" / name / "mixture")
        with torch.no_grad():
            logits.append(base.model(ids).logits)
            cached = base.model.generate(ids, max_new_tokens=6, do_sample=False)
            whole = base.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(cached, whole)
        assert mixture.state()[PRESENT].tolist() == [1, 1, 1]
        remove_mixture(mixture)
    assert not torch.equal(*logits)


def test_the_generalist_is_an_ordinary_adapter(run: RunFolder, tiny_folder: Path) -> None:
    base, ids = load_model(str(tiny_folder), device="cpu"), torch.arange(20)[None]
    with torch.no_grad():
        before = base.model(ids).logits
        with applied(base.model, run.arm("comigs") / "generalist") as shared:
            assert not torch.equal(shared(ids).logits, before)


def test_each_members_model_is_measured(run: RunFolder) -> None:
    table = run.read_table("utility", UtilityTable)
    assert table is not None
    measured = {(row.model, row.member) for row in table.rows}
    assert {(arm, name) for arm in ("comigs", "local") for name in CLIENTS} <= measured
    assert "comigs" in (run.path / "report.html").read_text()


def test_a_finished_run_is_not_trained_again(run: RunFolder) -> None:
    before = (run.arm("comigs") / "generalist" / "adapter_model.safetensors").stat().st_mtime_ns
    resume(run.path)
    assert (run.arm("comigs") / "generalist" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_it_runs_behind_masks(workplace: Path, tiny_folder: Path) -> None:
    (workplace / "west.jsonl").write_text((workplace / "south.jsonl").read_text().replace("south", "west"))
    clients = [{"name": name, "data": f"{name}.jsonl"} for name in (*CLIENTS, "west")]
    recipe = made(tiny_folder, privacy={"secure_aggregation": {}}, compare={}, clients=clients)

    _, (disclosure,) = rehearse(recipe, workplace)
    found = tune(recipe, workplace / "masked", base=workplace)

    assert not disclosure.declaration.seen
    assert (found.arm("comigs") / "generalist").is_dir()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"adapter": {"kind": "lora"}}, "comigs trains a mixture"),
        ({"strategy": {"name": "fedavg"}}, "comigs trains a mixture, and nothing else does"),
        ({"adapter": {"kind": "mixture", "rank": 2, "targets": ["q_proj"]}}, "is no layer of an MLP"),
        ({"adapter": {"kind": "mixture", "rank": 2, "specialists": 1}}, "there is room for 1 specialists"),
        ({"privacy": {"record": {"noise_multiplier": 1.0}}}, "experts and routers have optimisers"),
        ({"privacy": {"weight_noise": 0.1}}, "comigs leaves mixtures"),
        ({"train": {"learning_rate": 0.01, "largest_update": 1.0}}, "comigs sends its generalists"),
    ],
)
def test_what_does_not_go_together_is_refused(
    workplace: Path, tiny_folder: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        rehearse(made(tiny_folder, compare={}, **sections), workplace)


def test_a_member_whose_router_has_nothing_to_learn_from_is_told_before_any_work(
    workplace: Path, tiny_folder: Path
) -> None:
    (workplace / "one.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    clients = [{"name": name, "data": f"{name}.jsonl"} for name in (*CLIENTS, "one")]
    with pytest.raises(UserError, match=r"client 'one', arm 'comigs': 1 training record.*\n.*specialists = 0"):
        rehearse(made(tiny_folder, clients=clients), workplace)
    clients[-1]["specialists"] = 0  # type: ignore[assignment]
    rehearse(made(tiny_folder, clients=clients), workplace)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"kind": "mixture", "dropout": 0.1}, "a mixture has no dropout"),
        ({"kind": "mixture", "generalists": 0, "specialists": 0}, "a mixture has experts"),
        ({"specialists": 2}, "are of a mixture"),
    ],
)
def test_experts_that_are_none_are_refused(tiny_folder: Path, adapter: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(tiny_folder, adapter=adapter)
