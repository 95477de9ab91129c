"""What was kept is what scored highest, what chance kept is as much, and both are files that a recipe takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.attribution.conftest import write

from allmend.attribution.selection import select
from allmend.data.files import read_records
from allmend.errors import UserError
from allmend.influence.table import ROWS, Row, read_scores, write_scores
from allmend.recipe import Fields


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two clients with 10 records each; those of the second help more."""
    rows = []
    for client, base in (("north", 0), ("south", 5)):
        made: list[dict[str, Any]] = [
            {"id": str(i), "prompt": f"{client} {i}?", "response": "Yes.", "ward": "ab"[i % 2]} for i in range(10)
        ]
        write(tmp_path / f"{client}.jsonl", made)
        rows += [Row(str(i), client, "mean", float(base + i), 0, 1.0, "gfim") for i in range(10)]
    write_scores(tmp_path / "found" / ROWS, rows)
    return tmp_path


def kept(place: Path, **options: Any) -> dict[str, list[str]]:
    train = [place / "north.jsonl", place / "south.jsonl"]
    found = select(place / "found", train=train, out=place / "out", **{"keep": 0.5} | options)
    for one in found:
        chosen, chance = (read_records(str(path), fields=Fields())[0] for path in (one.chosen, one.by_chance))
        assert len(chosen) == len(chance) == one.kept
        assert {record.id for record in chance} <= {str(i) for i in range(10)}
        assert chosen[0].messages[0].content.startswith(one.client) if chosen else True
    return {one.client: [json.loads(line)["id"] for line in one.chosen.read_text().splitlines()] for one in found}


def test_the_highest_scores_of_all_are_kept(place: Path) -> None:
    found = kept(place)
    assert (
        found == {"north": ["8", "9"], "south": [str(i) for i in range(2, 10)]} or sum(map(len, found.values())) == 10
    )
    assert len(found["south"]) > len(found["north"])
    assert found["south"][-3:] == ["7", "8", "9"]


def test_a_record_without_a_score_comes_after_all_others(place: Path) -> None:
    rows = read_scores(place / "found" / ROWS)
    write_scores(place / "found" / ROWS, [replace(row, score=None) if row.record_id == "9" else row for row in rows])
    rest = [str(i) for i in range(9)]
    assert kept(place, per_client=True, keep=0.9) == {"north": rest, "south": rest}


def test_a_share_of_each_client_or_of_each_value_is_kept(place: Path) -> None:
    assert kept(place, per_client=True) == {"north": ["5", "6", "7", "8", "9"], "south": ["5", "6", "7", "8", "9"]}
    balanced = kept(place, per_client=True, balance="ward", keep=0.4)
    assert balanced == {"north": ["6", "7", "8", "9"], "south": ["6", "7", "8", "9"]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.0}, "lies between 0 and 1"),
        ({"keep": 1.5}, "lies between 0 and 1"),
        ({"target": "other"}, "there is no target 'other'"),
    ],
)
def test_what_cannot_be_kept_is_told(options: dict[str, Any], words: str, place: Path) -> None:
    with pytest.raises(UserError, match=words):
        kept(place, **options)
    assert not (place / "out").exists()


def test_a_field_that_no_record_has_is_told(place: Path) -> None:
    with pytest.raises(UserError, match="no record has the field 'floor'"):
        kept(place, balance="floor")
    assert not (place / "out").exists()


def test_files_of_one_name_are_kept_apart_and_within_the_folder(place: Path) -> None:
    """Clients are then called by their whole paths, which are no names of files."""
    train, scored = [place / "a" / "north.jsonl", place / "b" / "north.jsonl"], []
    for path in train:
        path.parent.mkdir()
        write(path, [{"id": str(i), "prompt": f"{path.parent.name} {i}?", "response": "Yes."} for i in range(10)])
        scored += [Row(str(i), str(path), "mean", float(i), 0, 1.0, "gfim") for i in range(10)]
    write_scores(place / "both" / ROWS, scored)
    before = {path.relative_to(place) for path in place.rglob("*")}
    found = select(place / "both", train=train, keep=0.5, out=place / "less")
    made = {path.relative_to(place) for path in place.rglob("*")} - before
    assert {path.parts[0] for path in made} == {"less"}
    for one, letter in zip(found, "ab", strict=True):
        for path in (one.chosen, one.by_chance):
            records, _ = read_records(str(path), fields=Fields())
            assert {record.messages[0].content[0] for record in records} == {letter}
            assert len(records) == 5


def test_records_without_a_score_are_told(place: Path) -> None:
    write(place / "south.jsonl", [{"id": "77", "prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match="1 records have no score, the first of them '77'"):
        kept(place)
    with pytest.raises(UserError, match="there is no such file"):
        select(place / "nothing", train=[place / "north.jsonl"], keep=0.5, out=place / "out")
