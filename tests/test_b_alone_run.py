"""A run in which A stays at its start: what travels, what is saved, and what is asked of the models afterwards."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from allmend import load_model, make_recipe, tune
from allmend.attribution.runs import attribute_run
from allmend.events import StepDone
from allmend.federation.arm import trainable_of
from allmend.learn.evaluate import score
from allmend.learn.scores import read_scores
from allmend.life import rehearse, resume
from allmend.models.adapters import add_lora, applied
from allmend.models.tensors import Tensors, nbytes
from allmend.noise_cost import noise_cost
from allmend.prepare import prepare
from allmend.recipe import Adapter, Recipe, RecipeError
from allmend.results import AuditTable
from allmend.run import RunFolder

CLIENTS = ("east", "north", "south")
COBO = {"name": "cobo", "rounds": 2, "geometry": "factors", "pairs_per_member": 3.0}

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(tiny_folder: Path) -> Make:
    def made(**sections: Any) -> Recipe:
        whole = {
            "seed": 5,
            "model": {"source": str(tiny_folder)},
            "data": {"held_out": 0.25},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in CLIENTS],
            "adapter": {"rank": 2, "learns": "b"},
            "train": {"learning_rate": 0.01, "batch_size": 4},
            "strategy": {"name": "fedavg", "rounds": 2},
            "compare": {
                "cobo": {"strategy": COBO},
                "ditto": {"strategy": {"name": "ditto"}},
                "trimmed": {"strategy": {"name": "trimmed_mean"}},
                "noisy": {"privacy": {"record": {"noise_multiplier": 0.5}, "weight_noise": 0.01}},
                "members": {"privacy": {"member": {"noise_multiplier": 0.5}}},
                "persisting": {"train": {"optimizer_state": "persist", "weight_decay": 0.1}},
            },
            "canaries": {"copies": [2], "count": 3},
            "audit": {
                "exposure": [],
                "membership_records": 0,
                "prefix_tokens": [5],
                "views": True,
                "models": ["fedavg", "cobo/north"],
            },
            "influence": {"min_records": 4, "reveal": "client_sums", "arms": ["fedavg"]},
            "engine": {"threads": 1},
        }
        return make_recipe(whole | sections)

    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for count, name in enumerate(CLIENTS):
        rows = [{"id": f"{name}{i}", "prompt": f"{i}?", "response": f"{name} {7 * i}"} for i in range(16 + 4 * count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(make: Make, place: Path) -> RunFolder:
    return tune(make(), place / "run", base=place)


@pytest.fixture(scope="module")
def start(tiny_folder: Path) -> Tensors:
    """What an adapter of the recipe's seed starts with, where both factors learn."""
    model = load_model(str(tiny_folder), device="cpu").model
    return add_lora(model, rank=2, alpha=16.0, targets=["q_proj", "v_proj"], seed=5).state()


def test_every_saved_adapter_has_the_first_a_bit_for_bit_and_another_b(run: RunFolder, start: Tensors) -> None:
    found = {path.parent.parent: load_file(path) for path in run.path.glob("arms/**/adapter_model.safetensors")}
    members = {run.arm(arm) / "members" / name for arm in ("cobo", "ditto") for name in CLIENTS}
    shared = {run.arm(arm) for arm in ("fedavg", "trimmed", "noisy", "members", "persisting")}
    assert found.keys() == members | shared
    for tensors in found.values():
        assert tensors.keys() == start.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, start[name]) == (".lora_A." in name), name


def test_a_is_in_no_message_state_or_view(run: RunFolder) -> None:
    files = [path for path in run.path.rglob("*.safetensors") if path.name != "adapter_model.safetensors"]
    assert {"views", "server", "members"} <= {part for path in files for part in (*path.parts, path.stem)}
    for path in files:
        names = load_file(path)
        assert not any("lora_A" in name for name in names), path
    assert any("lora_B" in name for path in files for name in load_file(path))


def test_the_saved_folder_is_the_model_that_was_measured(run: RunFolder, make: Make, place: Path) -> None:
    prepared = prepare(make(), place)
    for arm, member in (("fedavg", None), ("cobo", "north")):
        folder = run.arm(arm) if member is None else run.arm(arm) / "members" / member
        (scores,) = [found for found in read_scores(run.scores(arm)) if found.member == member]
        with applied(prepared.model.model, folder / "adapter") as model:
            for name in CLIENTS:
                held_out = prepared.held_out[name], prepared.held_out_encoded[name]
                found = score(model, *held_out, tokens_per_pass=512)
                measured = [one.nll for one in scores.by_client[name]]
                assert [one.nll for one in found] == pytest.approx(measured, rel=1e-5)


def test_the_dry_run_tells_of_b_alone(make: Make, place: Path) -> None:
    compare = {"both": {"adapter": {"learns": "both"}}, "cobo": {"strategy": COBO}}
    _, disclosures = rehearse(make(compare=compare, canaries=None, influence=None, audit={}), place)
    told = {disclosure.arm: disclosure for disclosure in disclosures}
    # rank 2 on q (32 → 32) and v (32 → 16) of two layers
    b, both = 2 * 2 * (32 + 16), 2 * 2 * (32 + 32 + 32 + 16)
    assert (told["fedavg"].trainable, told["both"].trainable) == (b, both)
    for arm, count in (("fedavg", b), ("both", both), ("cobo", b)):
        assert told[arm].message == told[arm].sent == 4 * count
    assert told["fedavg"].sizes == {"update": 4 * b}


def test_a_worker_process_interrupted_and_resumed_ends_at_the_same_bits(
    make: Make, place: Path, start: Tensors, tmp_path: Path
) -> None:
    def interrupt(event: Any) -> None:
        if isinstance(event, StepDone) and (event.arm, event.round) == ("cobo", 2):
            raise KeyboardInterrupt

    arms = {"cobo": {"strategy": COBO}, "hidden": {"privacy": {"secure_aggregation": {}}}}
    own = {"compare": arms, "canaries": None, "influence": None, "audit": {}}
    whole = tune(make(**own), tmp_path / "whole", base=place)
    many = make(**own, engine={"threads": 1, "workers": 1})
    with pytest.raises(KeyboardInterrupt):
        tune(many, tmp_path / "broken", base=place, listeners=[interrupt])
    resume(tmp_path / "broken")
    adapters = sorted(whole.path.glob("arms/**/adapter_model.safetensors"))
    assert len(adapters) == 5
    for path in adapters:
        assert all(torch.equal(one, start[name]) for name, one in load_file(path).items() if ".lora_A." in name)
        assert (tmp_path / "broken" / path.relative_to(whole.path)).read_bytes() == path.read_bytes()


def test_audits_of_views_and_of_members_models_read_b_beside_the_first_a(run: RunFolder) -> None:
    table = run.read_table("audit", AuditTable)
    assert table is not None
    assert {row.model for row in table.gaps} >= {"fedavg", "cobo/north"}
    views = {(view.model, view.round, view.party) for view in table.views}
    assert {("fedavg", round, party) for round in (1, 2) for party in ("members", "coordinator")} <= views


def test_influence_is_of_b_alone_and_is_measured_of_the_same_file(run: RunFolder) -> None:
    (arm,) = attribute_run(run.path).arms
    adapter = run.arm("fedavg") / "adapter" / "adapter_model.safetensors"
    assert arm.weights == hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert arm.records > 0
    assert all(math.isfinite(member.mean.value) for member in arm.members)
    with pytest.raises(Exception, match="no weight that learns matches"):
        attribute_run(run.path, changes={"modules": "lora_A"})
    attribute_run(run.path)


def test_the_price_of_noise_is_of_b_alone(run: RunFolder, start: Tensors) -> None:
    found = noise_cost(run.path, noise_on_average=0.1, rounds=3)
    saved = load_file(run.arm("fedavg") / "adapter" / "adapter_model.safetensors")
    b = {name: tensor for name, tensor in saved.items() if ".lora_B." in name}
    assert found.change == pytest.approx(math.sqrt(sum(float(one.double().square().sum()) for one in b.values())))
    assert found.noise == pytest.approx(found.deviation * math.sqrt(nbytes(b) / 4))


def test_a_is_that_of_the_seed_whatever_was_drawn_before(tiny_folder: Path) -> None:
    digests = []
    for seed, draws in ((5, 0), (5, 7), (6, 0)):
        torch.rand(draws)
        model = load_model(str(tiny_folder), device="cpu")
        with trainable_of(model, Adapter(rank=2, learns="b"), seed=seed) as trainable:
            digests.append(trainable.frozen_digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("strategy", "words"),
    [({"name": "cobo"}, "set geometry to 'factors'"), ({"name": "fedavg_product"}, "take fedavg instead")],
)
def test_what_needs_both_factors_is_refused_before_anything_is_written(
    strategy: dict[str, Any], words: str, make: Make, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        tune(make(compare={"other": {"strategy": strategy}}, audit={}), tmp_path / "run", base=place)
    assert not (tmp_path / "run").exists()
