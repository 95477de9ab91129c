"""Wrong records come to the head of the list, and the verdict compares with simple measures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.attribution.conftest import ADAPTER, rows, write
from tests.report.conftest import body_of, charts, part, said, table_of

from allmend.attribution import review as module
from allmend.attribution.review import review
from allmend.attribution.settings import Settings
from allmend.errors import UserError


@pytest.fixture(scope="module")
def place(adapt: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fourth answer is another's; the field `noisy` says so."""
    folder = tmp_path_factory.mktemp("review")
    made = rows("north", 24, "The sun is warm today.")
    for index, row in enumerate(made):
        row["noisy"] = index % 4 == 0
        if row["noisy"]:
            row["response"] = f"qwx {index} zzt"
    write(folder / "north.jsonl", made)
    write(folder / "test.jsonl", rows("test", 6, "The sun is warm today."))
    adapt(folder, "north", rate=0.05, rounds=12)
    return folder


@pytest.fixture
def reviewed(place: Path, tiny_folder: Path) -> Callable[..., Any]:
    def run(**options: Any) -> Any:
        adapter = place / ADAPTER
        given = {
            "train": [place / "north.jsonl"],
            "target": place / "test.jsonl",
            "settings": Settings(template="plain"),
        }
        return review(str(tiny_folder), adapter, **given | options)

    return run


def test_what_is_wrong_stands_in_front(reviewed: Callable[..., Any], tmp_path: Path) -> None:
    found = reviewed(noisy="noisy", out=tmp_path / "list.jsonl")
    assert sum(one.wrong for one in found.suspects) == 6
    assert found.found["loss"].auc.value > 0.9  # strange words are unlikely ones
    assert found.found.keys() == set(module.MEASURES)
    listed = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert [one["rank"] for one in listed] == list(range(1, 25))
    assert [one["influence"] for one in listed] == sorted((one["influence"] for one in listed), reverse=True)
    assert found.verdict.startswith(("Influence finds", "The simple measures"))


def test_the_page_beside_the_list_shows_what_each_measure_finds(reviewed: Callable[..., Any], tmp_path: Path) -> None:
    found = reviewed(noisy="noisy", out=tmp_path / "list.jsonl")
    path = tmp_path / "list.html"
    assert path.stat().st_mode & 0o077 == 0, "records are on it"
    body = body_of(path)
    assert found.verdict in said(part(body, "summary"))
    _, *figures = table_of(body, "What each measure finds")
    assert [row[0] for row in figures] == ["influence", "loss", "self-influence"]
    assert [row[1][:4] for row in figures] == [f"{one.auc.value:.2f}" for one in found.found.values()]
    _, *listed = table_of(body, "Records, the most suspicious first")
    assert [row[1] for row in listed] == [one.record_id for one in found.suspects]
    assert [row[6] for row in listed] == ["wrong" if one.wrong else "right" for one in found.suspects]
    assert all("qwx" in row[0] for row in listed if row[6] == "wrong")


def test_the_page_without_labels_has_the_records_alone(reviewed: Callable[..., Any], tmp_path: Path) -> None:
    found = reviewed(out=tmp_path / "list.jsonl")
    body = body_of(tmp_path / "list.html")
    assert charts(body) == []
    _, *listed = table_of(body, "Records, the most suspicious first")
    assert [row[1] for row in listed] == [one.record_id for one in found.suspects]
    assert found.verdict in said(body)


def test_a_list_that_is_called_as_its_page_is_refused(reviewed: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the name of the page beside the list"):
        reviewed(out=tmp_path / "list.html")
    assert list(tmp_path.iterdir()) == []


def test_without_labels_it_claims_nothing(reviewed: Callable[..., Any]) -> None:
    found = reviewed()
    assert found.found == {}
    assert "nothing here shows that influence finds more" in found.verdict
    assert {one.wrong for one in found.suspects} == {None}


@pytest.mark.parametrize(
    ("better", "words"),
    [
        ("influence", "Influence finds more than the loss and than self-influence."),
        ("loss", "Influence finds less than loss"),
        ("none", "The simple measures are as good"),
    ],
)
def test_the_verdict_is_that_of_paired_intervals(better: str, words: str) -> None:
    labels = [place % 4 == 0 for place in range(80)]
    good = [float(one) + 0.01 * (place % 7) for place, one in enumerate(labels)]
    poor = [float(place * 37 % 80) for place in range(80)]
    measures = {name: good if name == better else poor for name in module.MEASURES}
    assert words in module._verdict(measures, labels)


def test_labels_that_say_nothing_are_told(reviewed: Callable[..., Any], place: Path) -> None:
    with pytest.raises(UserError, match="says that no records are wrong"):
        reviewed(noisy="kind")


def test_questions_that_were_cut_away_are_told(reviewed: Callable[..., Any]) -> None:
    cut = reviewed(settings=Settings(template="plain", max_tokens=30))
    assert not any("cut, from the left" in note for note in reviewed().notes)
    assert any("longer than 30 tokens and cut, from the left of the question on" in note for note in cut.notes)
