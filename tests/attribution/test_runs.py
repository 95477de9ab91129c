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
from allmend.influence.methods import Gfim
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


def pooled(run: RunFolder, place: Path) -> dict[str, float]:
    """By the functions for records in one place, from the files alone."""
    model = load_model(read_frozen(run).model.source)
    encoder = Encoder(model.tokenizer, choose_template("plain", model.tokenizer), 512)
    ids = {record for name in CLIENTS for record in own(run, name)}
    records = [one for name in CLIENTS for one in read_records(str(place / f"{name}.jsonl"), fields=Fields())[0]]
    trained = [encoder.for_training(record) for record in records if record.id in ids]
    asked = [encoder.for_training(one) for one in read_records(str(place / "asked.jsonl"), fields=Fields())[0]]
    with learning_adapter(model.model, run.arm("fedavg") / "adapter") as trainable:
        values = influence(OfRecords(trainable, trained), OfRecords(trainable, asked), Gfim()).values[:, 0]
    return {record.id: float(value) for record, value in zip(trained, values, strict=True)}


@pytest.mark.parametrize("which", ["run", "hidden"])
def test_members_scores_are_those_of_pooled_records(which: str, place: Path, request: pytest.FixtureRequest) -> None:
    it: RunFolder = request.getfixturevalue(which)
    expected = pooled(it, place)
    found = {record: score for name in CLIENTS for record, score in own(it, name).items()}
    assert found.keys() == expected.keys()
    assert len(found) == 12 + 16 + 20 - sum(_held_out(it).values())
    a, b = (torch.tensor([one[key] for key in sorted(expected)], dtype=torch.float64) for one in (found, expected))
    assert float((a - b).norm() / b.norm()) < 1e-5  # single precision; what masks add is told below
    table = it.read_table("influence", InfluenceByMember)
    assert table is not None
    (arm,) = table.arms
    assert arm.hidden == (which == "hidden")
    assert arm.error is None if which == "run" else arm.error is not None and arm.error < 1e-6
    assert arm.records == len(found)


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


def test_targets_by_kind(run: RunFolder) -> None:
    (arm,) = attribute_run(run.path, changes={"targets": "kind"}).arms
    assert arm.targets == ("a", "b")
    assert len(arm.members) == 6
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


def test_a_dry_run_tells_what_would_leave(make: Make, place: Path) -> None:
    _, disclosures = life.rehearse(make(privacy={"secure_aggregation": {}}), place)
    told = disclosures[-1]
    assert told.arm == "fedavg, influence"
    assert set(told.declaration.summed) == {"size", "block", "records"}
    assert set(told.declaration.seen) == {"scores"}
    assert told.masked is not None
    assert told.masked > told.sizes["block"]
