"""A member's own page: its records at both ends, safe whatever a record holds, readable by the member alone."""

import os
from pathlib import Path

from allmend.report.influence_figures import MOST, ScoredRecord
from allmend.report.own import write_own


def page(tmp_path: Path, scores: list[float], text: str = "some words") -> str:
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    ranks = {place: rank for rank, place in enumerate(order, start=1)}
    records = [
        ScoredRecord(f"r{place}", "the aim", score, ranks[place], 1.5, text) for place, score in enumerate(scores)
    ]
    path = write_own(tmp_path / "own.html", records, client="east", arm="fedavg")
    if os.name == "posix":
        assert path.stat().st_mode & 0o077 == 0
    return path.read_text()


def test_the_ends_of_the_list_are_shown_and_no_record_twice(tmp_path: Path) -> None:
    shown = page(tmp_path, [float(place - 50) for place in range(100)])
    assert shown.count("<tr") == 2 * (MOST + 1)
    assert ">r0<" in shown
    assert ">r99<" in shown
    assert ">r50<" not in shown
    few = page(tmp_path, [3.0, -1.0, 2.0])
    assert [few.count(f">r{place}<") for place in range(3)] == [1, 1, 1]
    assert "1 of 3 scores are below 0" in few


def test_records_that_all_help_leave_no_list_of_harm(tmp_path: Path) -> None:
    shown = page(tmp_path, [1.0, 2.0])
    assert "No record has a score below 0." in shown
    assert "None is below 0." in shown
    assert "<svg" not in page(tmp_path, [1.0])


def test_what_a_record_holds_is_no_markup_and_is_cut(tmp_path: Path) -> None:
    shown = page(tmp_path, [1.0, -1.0], "<script>alert(1)</script> " + "word " * 200)
    assert "<script>alert" not in shown
    assert "&lt;script&gt;alert(1)" in shown
    assert "…" in shown
