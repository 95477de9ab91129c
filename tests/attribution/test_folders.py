"""Influence on a model and adapter made elsewhere: what was learnt from a record is found at that record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.attribution.conftest import ADAPTER, rows, write

from allmend.attribution.folders import attribute_folder
from allmend.attribution.settings import Settings
from allmend.errors import UserError
from allmend.events import PhaseDone, WorkPlanned
from allmend.influence.methods import Gfim
from allmend.influence.table import ABOUT, ROWS, InfluenceTable, read_scores


@pytest.fixture(scope="module")
def place(adapt: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients, a target that is like the second one's records, and an adapter that was trained on both."""
    folder = tmp_path_factory.mktemp("attribution")
    write(folder / "north.jsonl", rows("north", 10))
    write(folder / "south.jsonl", rows("south", 10, "The sun is warm today."))
    write(folder / "test.jsonl", rows("test", 6, "The sun is warm today."))
    adapt(folder, "north", "south", rate=0.02, rounds=3)
    return folder


@pytest.fixture
def attribute(place: Path, tiny_folder: Path) -> Callable[..., Any]:
    def run(**options: Any) -> Any:
        settings = Settings(template="plain", **options.pop("settings", {}))
        given = {
            "train": [place / "north.jsonl", place / "south.jsonl"],
            "target": place / "test.jsonl",
            "settings": settings,
        }
        return attribute_folder(str(tiny_folder), place / ADAPTER, **given | options)

    return run


@pytest.mark.parametrize("method", ["gfim", "exact", "datainf", "lissa", "hessian_free"])
def test_records_like_the_target_help_more(method: str, attribute: Callable[..., Any]) -> None:
    found = attribute(settings={"method": method})
    mean = {one.client: one.mean.value for one in found.table.clients}
    assert mean["south"] > mean["north"]
    (best, *_) = sorted(found.rows, key=lambda row: row.rank)
    assert best.client == "south"
    assert sorted(row.rank for row in found.rows) == list(range(1, 21))


def test_figures_and_files_say_the_same(attribute: Callable[..., Any], tmp_path: Path) -> None:
    events: list[Any] = []
    found = attribute(out=tmp_path / "out", listeners=[events.append])
    assert read_scores(tmp_path / "out" / ROWS) == found.rows
    table = InfluenceTable.model_validate_json((tmp_path / "out" / ABOUT).read_bytes())
    assert table == found.table
    assert (table.records, table.target_records) == (20, 6)
    assert "lowers the target's loss" in table.sign
    for one in table.clients:
        scores = torch.tensor([row.score for row in found.rows if row.client == one.client])
        assert one.mean.value == pytest.approx(float(scores.mean()))
        assert one.harmful.value == pytest.approx(float((scores < 0).float().mean()))
    assert table.reliability["mean"].value > 0.5
    assert type(events[0]) is WorkPlanned
    assert type(events[-1]) is PhaseDone


def test_a_target_for_each_label_or_record(attribute: Callable[..., Any]) -> None:
    by_kind = attribute(settings={"targets": "kind"})
    assert sorted({row.target for row in by_kind.rows}) == ["a", "b"]
    each = attribute(settings={"targets": "each"})
    assert sorted({row.target for row in each.rows}) == [f"test-{i}" for i in range(6)]
    assert each.table.reliability == {}
    # the mean target's score is the mean of the targets' scores
    whole = attribute()
    for row in whole.rows:
        parts = [other.score for other in each.rows if other.record_id == row.record_id]
        assert row.score == pytest.approx(sum(parts) / 6, rel=1e-4, abs=1e-7)


def test_removing_what_hurts_most_helps_more_than_chance(attribute: Callable[..., Any]) -> None:
    """Scores are what one gradient step would do: the loss after a step on the helpful half is lower."""
    found = attribute()
    half = [row for row in found.rows if row.rank <= 10]
    assert sum(row.score for row in half) > 0
    assert isinstance(Settings().build(), Gfim)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "magic"}, "there is no method 'magic'"),
        ({"inverse": "magic"}, "there is no inverse 'magic'"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"modules": "k_proj"}, "no weight that learns matches 'k_proj'"),
    ],
)
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], words: str, attribute: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=words):
        attribute(settings=settings)


def test_files_that_cannot_be_used_are_told(
    attribute: Callable[..., Any], place: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no such file"):
        attribute(target=tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="no adapter is here"):
        attribute_folder(str(tiny_folder), tmp_path, train=[place / "north.jsonl"], target=place / "test.jsonl")
    with pytest.raises(UserError, match="is named twice"):
        attribute(train=[place / "north.jsonl", place / "north.jsonl"])
    write(tmp_path / "plain.jsonl", [{"id": "1", "prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match="no label"):
        attribute(target=tmp_path / "plain.jsonl", settings={"targets": "kind"})
    assert not (tmp_path / "out").exists()
