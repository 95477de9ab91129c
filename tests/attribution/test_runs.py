"""Whose data helped in a run: the same figures as of pooled records, in sight and behind masks; what stays at home."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.attribution.conftest import rows, write

from allmend import life
from allmend.attribution.runs import FOLDER, attribute_run
from allmend.data.chat import Encoder, choose_template
from allmend.data.files import read_records
from allmend.errors import UserError
from allmend.influence.gradients import OfRecords
from allmend.influence.methods import DataInf, Gfim, HessianFree
from allmend.influence.scores import influence
from allmend.influence.table import ROWS, read_scores
from allmend.intervals import mean
from allmend.learn.scores import read_scores as read_losses
from allmend.models.adapters import learning_adapter
from allmend.models.load import load_model
from allmend.prepare import read_frozen
from allmend.recipe import Fields, Recipe, RecipeError, make_recipe
from allmend.results import InfluenceByMember
from allmend.run import RunFolder

CLIENTS = ("east", "north", "south")
ALONE: dict[str, Any] = {"reveal": "client_sums", "min_records": 4, "target": "asked.jsonl"}

METHODS = {"gfim": Gfim(), "datainf": DataInf(), "hessian_free": HessianFree()}

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(tiny_folder: Path) -> Make:
    """A recipe of three clients; keyword arguments are sections."""

    def made(**sections: Any) -> Recipe:
        whole = {
            "name": "whose",
            "model": {"source": str(tiny_folder)},
            "data": {"held_out": 0.25, "template": "plain"},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in CLIENTS],
            "adapter": {"rank": 2},
            "train": {"learning_rate": 1e-2, "batch_size": 4},
            "strategy": {"name": "fedavg", "rounds": 2},
            "influence": ALONE,
        }
        return make_recipe(whole | sections)

    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whose")
    for count, name in enumerate(CLIENTS):
        write(folder / f"{name}.jsonl", rows(name, 12 + 4 * count))
    write(folder / "asked.jsonl", rows("asked", 6))
    return folder


@pytest.fixture(scope="module")
def run(make: Make, place: Path) -> RunFolder:
    return life.tune(make(), place / "run", base=place)


@pytest.fixture(scope="module")
def hidden(make: Make, place: Path) -> RunFolder:
    return life.tune(make(privacy={"secure_aggregation": {}}), place / "hidden", base=place)


def own(run: RunFolder, name: str) -> dict[str, float]:
    found = read_scores(run.arm("fedavg") / FOLDER / name / ROWS)
    return {row.record_id: float(row.score or 0) for row in found}


def pooled(run: RunFolder, place: Path, method: str = "gfim") -> dict[str, float]:
    """By the functions for records in one place, from the files alone."""
    model = load_model(read_frozen(run).model.source)
    encoder = Encoder(model.tokenizer, choose_template("plain", model.tokenizer), 512)
    ids = {record for name in CLIENTS for record in own(run, name)}
    records = [one for name in CLIENTS for one in read_records(str(place / f"{name}.jsonl"), fields=Fields())[0]]
    trained = [encoder.for_training(record) for record in records if record.id in ids]
    asked = [encoder.for_training(one) for one in read_records(str(place / "asked.jsonl"), fields=Fields())[0]]
    with learning_adapter(model.model, run.arm("fedavg") / "adapter") as trainable:
        values = influence(OfRecords(trainable, trained), OfRecords(trainable, asked), METHODS[method]).values[:, 0]
    return {record.id: float(value) for record, value in zip(trained, values, strict=True)}


@pytest.mark.parametrize("which", ["run", "hidden"])
@pytest.mark.parametrize("method", ["datainf", "hessian_free", "gfim"])  # what the recipe asks for stays, at the end
def test_members_scores_are_those_of_pooled_records(
    which: str, method: str, place: Path, request: pytest.FixtureRequest
) -> None:
    it: RunFolder = request.getfixturevalue(which)
    (arm,) = attribute_run(it.path, changes={"method": method}).arms
    expected = pooled(it, place, method)
    found = {record: score for name in CLIENTS for record, score in own(it, name).items()}
    assert found.keys() == expected.keys()
    assert len(found) == 12 + 16 + 20 - sum(_held_out(it).values())
    a, b = (torch.tensor([one[key] for key in sorted(expected)], dtype=torch.float64) for one in (found, expected))
    assert float((a - b).norm() / b.norm()) < 1e-5  # single precision; what masks add is told below
    assert arm.hidden == (which == "hidden")
    rounded = which == "hidden" and method != "hessian_free"  # nothing is summed that directions are made of
    assert arm.error is not None and 0 < arm.error < 1e-6 if rounded else arm.error is None
    assert arm.records == (0 if method == "hessian_free" else len(found))
    assert arm.method == method
    rows = read_scores(it.arm("fedavg") / FOLDER / "east" / ROWS)
    assert {row.method for row in rows} == {method}


@pytest.mark.parametrize("method", ["gfim", "datainf"])
def test_the_sizes_that_the_dry_run_names_are_those_that_travel(method: str, make: Make, place: Path) -> None:
    recipe = make(influence=ALONE | {"method": method, "target": "held_out"})
    _, disclosures = life.rehearse(recipe, place)
    (told,) = (one.sizes for one in disclosures if one.arm == "fedavg, influence")
    folder = life.tune(recipe, place / f"named-{method}", base=place)
    legs = {leg.name: leg.received for leg in folder.read_table("influence", InfluenceByMember).arms[0].legs}
    part = "block" if method == "gfim" else "correction"
    assert legs["sizes"] == told["size"] + told["target"]
    assert legs[f"{part}s"] == told[part]


@pytest.mark.parametrize("which", ["run", "hidden"])
def test_what_is_not_needed_does_not_travel(which: str, request: pytest.FixtureRequest) -> None:
    it: RunFolder = request.getfixturevalue(which)
    legs = {
        (method, target): attribute_run(it.path, changes={"method": method, "target": target}).arms[0].legs
        for method in METHODS
        for target in ("held_out", str(Path(it.facts["base"]) / "asked.jsonl"))
    }
    names = {key: [leg.name for leg in some] for key, some in legs.items()}
    attribute_run(it.path)
    for (method, target), found in names.items():
        second = {"gfim": ["sizes", "blocks"], "datainf": ["sizes", "corrections"]}.get(method)
        assert found == [*(second or (["target"] if target == "held_out" else [])), "scores"]
    sent = {key: sum(leg.received for leg in some) for key, some in legs.items()}
    for target in {target for _, target in sent}:
        assert sent["hessian_free", target] < sent["datainf", target] < sent["gfim", target]
    (own_file,) = (
        value for (method, target), value in sent.items() if method == "hessian_free" and target != "held_out"
    )
    assert own_file <= 64, "numbers alone"


def test_the_error_of_a_held_out_target_is_told_where_it_is_all_that_is_rounded(hidden: RunFolder) -> None:
    (arm,) = attribute_run(hidden.path, changes={"method": "hessian_free", "target": "held_out"}).arms
    attribute_run(hidden.path)
    assert arm.error is not None
    assert 0 < arm.error < 1e-5


@pytest.mark.parametrize("which", ["run", "hidden"])
@pytest.mark.parametrize("method", ["datainf", "gfim"])
def test_clipping_is_told_and_one_that_no_gradient_reaches_changes_nothing(
    which: str, method: str, request: pytest.FixtureRequest
) -> None:
    it: RunFolder = request.getfixturevalue(which)
    (plain,) = attribute_run(it.path, changes={"method": method}).arms
    before = {name: own(it, name) for name in CLIENTS}
    (wide,) = attribute_run(it.path, changes={"method": method, "clip": 1e6}).arms
    assert {name: own(it, name) for name in CLIENTS} == before
    assert (wide.clip, wide.clipped, wide.members) == (1e6, 0, plain.members)
    assert wide.gradients == plain.gradients * wide.records if plain.gradients else wide.gradients % wide.records == 0
    (short,) = attribute_run(it.path, changes={"method": method, "clip": 0.05}).arms
    assert 0 < short.clipped <= short.gradients
    assert {name: own(it, name) for name in CLIENTS} != before
    page = " ".join((it.path / "report.html").read_text().split())
    assert "were scaled down to norm" in page
    attribute_run(it.path)
    assert "were scaled down to norm" not in (it.path / "report.html").read_text()


def _held_out(run: RunFolder) -> dict[str, int]:
    return {name: len(some) for name, some in read_losses(run.scores("base"))[0].by_client.items()}


def test_the_table_tells_what_the_scores_come_to_and_the_page_has_it(run: RunFolder) -> None:
    table = run.read_table("influence", InfluenceByMember)
    assert table is not None
    (arm,) = table.arms
    assert [(one.client, one.target) for one in arm.members] == [(name, "all") for name in CLIENTS]
    for one in arm.members:
        scores = list(own(run, one.client).values())
        expected = mean(scores)
        assert one.mean.value == pytest.approx(expected.value, rel=1e-9)
        assert one.mean.low == pytest.approx(expected.low, rel=1e-6)
        assert one.below.value == sum(score < 0 for score in scores) / len(scores)
        assert one.size == pytest.approx(sum(map(abs, scores)) / len(scores), rel=1e-6)
        assert one.balance == pytest.approx(sum(scores) / sum(map(abs, scores)), rel=1e-6)
    # shown in units of the mean absolute score of all records
    everything = [score for name in CLIENTS for score in own(run, name).values()]
    unit = sum(map(abs, everything)) / len(everything)
    for one in arm.told("all"):
        assert one.mean.value == pytest.approx(mean(list(own(run, one.client).values())).value / unit, rel=1e-6)
    assert [leg.name for leg in arm.legs] == ["sizes", "blocks", "scores"]
    page = (run.path / "report.html").read_text()
    assert "Whose data helped" in page
    for name in CLIENTS:
        assert (run.arm("fedavg") / FOLDER / name / "influence.html").read_text().count("<h2") == 2


def test_again_with_another_target_and_nothing_revealed(run: RunFolder) -> None:
    before = {name: own(run, name) for name in CLIENTS}
    table = attribute_run(run.path, changes={"target": "held_out", "reveal": "none"})
    (arm,) = table.arms
    assert (arm.target, arm.members, arm.silent) == ("held_out", (), ())
    assert arm.target_records == sum(_held_out(run).values())
    assert all(before[name] != own(run, name) for name in CLIENTS)
    assert "keep to themselves" in (run.path / "report.html").read_text()
    assert attribute_run(run.path).arms[0].members  # the recipe's own settings again


@pytest.mark.parametrize("which", ["run", "hidden"])
def test_targets_by_kind(which: str, request: pytest.FixtureRequest) -> None:
    run: RunFolder = request.getfixturevalue(which)
    (arm,) = attribute_run(run.path, changes={"targets": "kind"}).arms
    assert arm.targets == ("a", "b")
    assert len(arm.members) == 6
    for method in ("datainf", "hessian_free"):
        (other,) = attribute_run(run.path, changes={"targets": "kind", "method": method}).arms
        assert [(one.client, one.target) for one in other.members] == [(one.client, one.target) for one in arm.members]
    attribute_run(run.path)


def test_clients_with_few_records_are_named_and_not_told_of(run: RunFolder) -> None:
    (arm,) = attribute_run(run.path, changes={"min_records": 12}).arms
    assert arm.silent
    assert {one.client for one in arm.members} == set(CLIENTS) - set(arm.silent)
    with pytest.raises(UserError, match="no member has 100 records or more"):
        attribute_run(run.path, changes={"min_records": 100})
    attribute_run(run.path)


def test_a_run_without_the_section_can_be_asked_later(make: Make, place: Path) -> None:
    run = life.tune(make(influence=None), place / "later", base=place)
    assert run.read_table("influence", InfluenceByMember) is None
    assert "Whose data helped" not in (run.path / "report.html").read_text()
    (arm,) = attribute_run(run.path, changes={"min_records": 4}).arms
    assert [one.client for one in arm.members] == list(CLIENTS)
    with pytest.raises(UserError, match="damping"):
        attribute_run(run.path, changes={"damping": 0.0})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"influence": {"target": "nowhere.jsonl"}}, "is no file"),
        ({"influence": {"modules": "("}}, "is no regular expression"),
        ({"strategy": {"name": "local"}}, "ends with a model for each client"),
        ({"adapter": {"kind": "full"}}, "learns everything"),
        ({"privacy": {"record": {"noise_multiplier": 1.0}}}, "promises differential privacy"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_trained(
    sections: dict[str, Any], words: str, make: Make, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        life.tune(make(**sections), tmp_path / "run", base=place)


def test_the_members_held_out_records_have_no_kinds(make: Make) -> None:
    with pytest.raises(RecipeError, match="have no kinds"):
        make(influence={"targets": "kind"})
    with pytest.raises(RecipeError, match="no arm of this recipe is called other"):
        make(influence={"arms": ["other"]})
    with pytest.raises(RecipeError, match="no curvature whose gradients are clipped to 2"):
        make(influence={"method": "hessian_free", "clip": 2.0})
    with pytest.raises(RecipeError, match=r"influence\.clip"):
        make(influence={"clip": 0.0})


def test_a_dry_run_tells_what_would_leave(make: Make, place: Path) -> None:
    _, disclosures = life.rehearse(make(privacy={"secure_aggregation": {}}), place)
    told = disclosures[-1]
    assert told.arm == "fedavg, influence"
    assert set(told.declaration.summed) == {"size", "block", "records"}
    assert set(told.declaration.seen) == {"scores"}
    assert told.masked is not None
    assert told.masked > told.sizes["block"]
    kinds = ALONE | {"method": "datainf", "targets": "kind"}
    _, disclosures = life.rehearse(make(influence=kinds), place)
    assert "for each of 2 targets" in disclosures[-1].declaration.summed["correction"]
