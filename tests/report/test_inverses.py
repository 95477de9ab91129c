"""The page of inverses: every residual and time is on it, on axes of equal factors."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.report.conftest import body_of, charts, part, said, table_of, tips

from allmend.report.inverses import Timed, write_inverses

RESIDUALS = {"order 2": (1.0, 1e-2, 1e-4, 0.0), "order 3": (1.0, 1e-3)}
ERRORS = {"order 2": (1.0, 1e-1), "LiSSA": (0.9, 0.8, 0.7)}
TIMINGS = {
    "1 × 8, condition 4": (
        Timed("quick", "quick, 8 right sides", (0.001, 0.002, 0.009), 1e-7),
        Timed("slow", "slow, 3 steps", (0.02, 0.02), 1e-5),
        Timed("lost", "lost", (), None),
    )
}


def page(tmp_path: Path, **more: Any) -> ElementTree.Element:
    known: dict[str, Any] = {
        "residuals": RESIDUALS,
        "errors": ERRORS,
        "without_steps": {"none": 0.5},
        "timings": TIMINGS,
        "verdict": "`quick` wins.",
        "about_steps": ["One matrix."],
        "about_times": "Medians.",
        "facts": [("Device", "<cpu>")],
    }
    return body_of(write_inverses(tmp_path / "page.html", **known | more))


def test_each_order_has_a_line_on_an_axis_of_equal_factors(tmp_path: Path) -> None:
    residual, error = charts(part(page(tmp_path), "steps"))
    lines = {line.get("data-series"): line for line in residual.findall(".//g[@data-series]")}
    assert lines.keys() == {"order 2", "order 3"}
    heights = [float(circle.get("cy", "nan")) for circle in lines["order 2"].iter("circle")]
    assert len(heights) == 3, "a residual of 0 has no place"
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert "order 2, step 2\nresidual 10⁻⁴" in tips(residual)
    assert {group.get("data-series") for group in error.findall(".//g[@data-series]")} == {"none", "order 2", "LiSSA"}
    assert sum(tip.startswith("LiSSA") for tip in tips(error)) == 3


def test_steps_and_times_are_in_tables(tmp_path: Path) -> None:
    body = page(tmp_path)
    head, *rows = table_of(part(body, "steps"), "Residuals and errors by step")
    assert head == ["Step", "Residual, order 2", "Residual, order 3", "Error, order 2", "Error, LiSSA"]
    assert len(rows) == 4
    assert rows[3] == ["3", "0", "", "", ""]
    _, quick, slow, lost = table_of(part(body, "times"), "Milliseconds of each inverse")
    assert quick[1:] == ["quick, 8 right sides", "21 to 9", "1 ×", "10⁻⁷"]
    assert slow[2:4] == ["2020 to 20", "10 ×"]
    assert lost[2:] == ["gave up", "–", "–"]
    (plot,) = charts(part(body, "times"))
    assert [tip.split("\n")[0] for tip in tips(plot)] == ["quick, 1 × 8, condition 4", "slow, 1 × 8, condition 4"]


def test_what_is_to_be_typed_is_set_so_and_names_are_no_markup(tmp_path: Path) -> None:
    body = page(tmp_path, verdict="`quick` <wins>.")
    assert [one.text for one in part(body, "summary").iter("code")] == ["quick"]
    assert "<wins>." in said(part(body, "summary"))
    assert "<cpu>" in said(body)
