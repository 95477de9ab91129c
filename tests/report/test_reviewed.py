"""The page of records to review: its curve is what it says, each list begins on it, labels decide what is told."""

import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from tests.report.conftest import EVIL, body_of, charts, part, said, table_of, tips

from allmend import intervals
from allmend.report.reviewed import MOST, Found, Suspicious, detection_curve, write_reviewed
from allmend.results import Estimate

labelled = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({wrong for _, wrong in rows}) == 2
)


@given(labelled)
def test_the_area_under_the_curve_follows_from_the_auc(rows: list[tuple[int, bool]]) -> None:
    measure, wrong = [float(value) for value, _ in rows], [label for _, label in rows]
    curve = detection_curve(measure, wrong)
    assert (curve[0], curve[-1]) == ((0, 0), (1, 1))
    assert all(a < b and c <= d for (a, c), (b, d) in pairwise(curve))
    area = sum((b - a) * (c + d) / 2 for (a, c), (b, d) in pairwise(curve))
    part_wrong = sum(wrong) / len(wrong)
    assert area == pytest.approx(part_wrong / 2 + (1 - part_wrong) * roc_auc_score(wrong, measure))


def test_a_measure_that_says_nothing_is_chance_and_one_that_knows_finds_all_first() -> None:
    wrong = [True, False, False, True]
    assert detection_curve([1.0] * 4, wrong) == ((0, 0), (1, 1))
    assert detection_curve([float(one) for one in wrong], wrong) == ((0, 0), (0.5, 1), (1, 1))


def records(n: int = 200, *, labels: bool = True, text: str = "words") -> list[Suspicious]:
    """By `loss` the other way round than by `influence`; every fifth is wrong."""
    return [
        Suspicious(f"r{i}", "east", {"influence": float(n - i), "loss": float(i)}, text, i % 5 == 0 if labels else None)
        for i in range(n)
    ]


def page(tmp_path: Path, some: list[Suspicious], **more: Any) -> ElementTree.Element:
    known: dict[str, Any] = {
        "found": {},
        "verdict": "Nothing is shown.",
        "facts": [("Model", "tiny")],
        "settings": [("Method", "gfim")],
    }
    known |= more
    path = write_reviewed(tmp_path / "list.html", some, known.pop("found"), **known)
    if os.name == "posix":
        assert path.stat().st_mode & 0o077 == 0, "records are on it"
    return body_of(path)


def found_of(some: list[Suspicious]) -> dict[str, Found]:
    wrong = [bool(one.wrong) for one in some]
    found = {}
    for name in some[0].measures:
        measure = [one.measures[name] for one in some]
        order = sorted(range(len(some)), key=lambda place: -measure[place])
        recall = {
            depth: intervals.share(sum(wrong[place] for place in order[: round(depth * len(some))]), sum(wrong))
            for depth in (0.1, 0.2)
        }
        found[name] = Found(
            Estimate(value=float(roc_auc_score(wrong, measure)), low=0.3, high=0.7, n=len(some)), recall
        )
    return found


def test_heads_of_all_lists_are_there_and_what_stands_in_none_is_not(tmp_path: Path) -> None:
    head, *rows = table_of(page(tmp_path, records()), "Records, the most suspicious first")
    assert head == ["Record", "Id", "Client", "Influence", "Loss", "Label"]
    assert [row[1] for row in rows] == [f"r{i}" for i in range(200) if i < MOST or i >= 200 - MOST]
    assert rows[0][2:] == ["east", "200rank 1", "0.00rank 200", "wrong"]
    assert rows[1][5] == "right"


def test_without_labels_there_is_the_list_and_no_curve(tmp_path: Path) -> None:
    body = page(tmp_path, records(5, labels=False), verdict="No label says what is wrong.")
    assert charts(body) == []
    head, *rows = table_of(body, "Records, the most suspicious first")
    assert "Label" not in head
    assert len(rows) == 5
    assert "No label says what is wrong." in said(part(body, "summary"))
    assert "All 5 records" in said(part(body, "records"))


def test_with_labels_there_are_a_curve_for_each_measure_and_chance(tmp_path: Path) -> None:
    some = records()
    random.Random(2).shuffle(some)
    found = found_of(some)
    body = page(tmp_path, some, found=found, verdict="Influence finds less than loss: sort by that.", notes=["A note."])
    curves, plot = charts(part(body, "found"))
    lines = {line.get("data-name"): line for line in curves.iter("polyline")}
    assert lines.keys() == {"influence", "loss", "chance"}
    assert len((lines["chance"].get("data-x") or "").split()) == 2
    wrong = [bool(one.wrong) for one in some]
    for name in ("influence", "loss"):
        expected = detection_curve([one.measures[name] for one in some], wrong)
        for axis, values in zip("xy", zip(*expected, strict=True), strict=True):
            drawn = [float(value) for value in (lines[name].get(f"data-{axis}") or "").split()]
            assert drawn == pytest.approx([100 * value for value in values], rel=1e-3, abs=1e-3)
        for depth, recall in found[name].recall.items():
            (tip,) = (tip for tip in tips(curves) if tip.startswith(f"{name}, {100 * depth:.0f}\u202f%"))
            assert f"{100 * recall.value:.1f}\u202f% of the wrong ones" in tip
            assert "95\u202f% interval" in tip
    assert [tip.split("\n")[0] for tip in tips(plot)] == ["influence", "loss"]
    head, *rows = table_of(body, "What each measure finds")
    assert head == ["Measure", "AUC", "Found in 10 %", "Found in 20 %"]
    assert [row[0] for row in rows] == ["influence", "loss"]
    assert all("0.30 to 0.70" in row[1] for row in rows)
    assert "sort by that" in said(part(body, "summary"))
    assert "A note." in said(part(body, "measured"))


def test_curves_of_many_records_stay_small(tmp_path: Path) -> None:
    some = records(20_000)
    curves, _ = charts(part(page(tmp_path, some, found=found_of(some)), "found"))
    lines = {line.get("data-name"): (line.get("data-x") or "").split() for line in curves.iter("polyline")}
    assert 100 < len(lines["loss"]) <= 301
    assert (lines["loss"][0], lines["loss"][-1]) == ("0", "100")
    assert (tmp_path / "list.html").stat().st_size < 300_000


def test_what_records_hold_is_no_markup(tmp_path: Path) -> None:
    hostile = [Suspicious(EVIL + one.id, EVIL, one.measures, EVIL + "word " * 100, one.wrong) for one in records(10)]
    body = page(tmp_path, hostile, found=found_of(hostile), verdict=EVIL, facts=[(EVIL, EVIL)], notes=[EVIL])
    _, first, *_ = table_of(body, "Records, the most suspicious first")
    assert first[0].startswith(EVIL)
    assert len(first[0]) <= 300
    assert first[1] == f"{EVIL}r0"
