"""Axes, places of labels and the shapes that charts are made of."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend.report.axes import Axis, round_ticks, scale
from allmend.report.charts import Point, Row, Series, bars, interval_plot, line_chart
from allmend.report.marks import dash, marker, spread

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 6))


@given(finite, finite, st.integers(2, 8))
def test_ticks_cover_the_values_at_equal_round_steps(a: float, b: float, about: int) -> None:
    low, high = sorted((a, b))
    ticks = round_ticks(low, high, about)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    steps = [right - left for left, right in pairwise(ticks)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-3) for step in steps)
    assert 1 <= len(steps) <= 2 * about + 2


@given(st.lists(st.floats(0, 200), min_size=1, max_size=12), st.floats(1, 20))
def test_labels_are_apart_in_order_and_inside(wanted: list[float], gap: float) -> None:
    low, high = 0.0, 200.0
    places = spread(wanted, gap, low, high)
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    assert all(low - 1e-6 <= place <= high + 1e-6 for place in places)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for first, second in pairwise(order):
        assert places[second] - places[first] >= gap - 1e-6


def test_labels_that_fit_stay_where_they_are() -> None:
    assert spread([50.0, 10.0, 90.0], 15, 0, 100) == [50.0, 10.0, 90.0]


def test_scale_maps_its_ends_and_ordinal_places_are_equal() -> None:
    x = scale(Axis("x"), [0, 10], 100, 200)
    assert (x(0), x(10)) == (100, 200)
    copies = scale(Axis("copies", ticks=(1, 3, 10), ordinal=True), [], 0, 300)
    assert [copies(c) for c in (1, 3, 10)] == pytest.approx([50, 150, 250])


def test_equal_factors_have_equal_distances_on_a_log_axis() -> None:
    draws = scale(Axis("n", ticks=(1, 10, 1000), log=True), [], 100, 400)
    assert [draws(n) for n in (1, 10, 100, 1000)] == pytest.approx([100, 200, 300, 400])
    assert scale(Axis("n", ticks=(10,), log=True), [], 0, 100)(10) == pytest.approx(50)


@given(st.floats(-14, 6), st.floats(0, 12), st.integers(2, 6))
def test_a_log_axis_without_ticks_has_powers_of_ten_and_covers_the_values(
    first: float, span: float, about: int
) -> None:
    low, high = 10**first, 10 ** (first + span)
    x = scale(Axis("x", log=True), [high, 0.0, low, -1.0, math.nan], 0, 100, about=about)
    assert all(-1e-6 <= x(value) <= 100 + 1e-6 for value in (low, high))
    exponents = [math.log10(tick) for tick in x.ticks]
    assert exponents == pytest.approx([round(one) for one in exponents])
    assert 1 <= len(x.ticks) <= 2 * about + 1
    assert len({round(right - left) for left, right in pairwise(exponents)}) <= 1
    assert (x.has(low), x.has(0.0), x.has(-1.0), x.has(math.inf)) == (True, False, False, False)


def test_equal_factors_are_equal_steps_on_a_log_axis_and_what_has_no_place_is_left_out() -> None:
    points = tuple(Point(step, value, f"step {step}") for step, value in enumerate((1.0, 1e-3, 1e-6, 0.0)))
    series = Series("s", "s", 0, points, trace=((0.0, 0.0), (1.0, 1e-3)))
    chart = ElementTree.fromstring(line_chart("t", [series], Axis("step"), Axis("residual", log=True)))
    heights = [float(circle.get("cy", "nan")) for circle in chart.findall(".//circle")]
    assert len(heights) == 3
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert heights[1] > heights[0]
    (line,) = chart.findall(".//polyline")
    assert len(line.get("points", "").split()) == 1
    rows = [Row("a", "a", 0, 10.0, "10", "tip", 1.0, 100.0), Row("b", "b", 1, 0.0, "0", "tip")]
    plot = ElementTree.fromstring(interval_plot("t", [("", rows)], Axis("ms", log=True)))
    assert len(plot.findall(".//g[@class='pt']")) == 1


def test_reference_and_limit_are_drawn_at_their_values() -> None:
    axis = Axis("bits", low=0.0, reference=1.44, limit=7.17)
    points = tuple(Point(x, y, "tip") for x, y in ((1, 1.44), (2, 7.17)))
    chart = ElementTree.fromstring(line_chart("t", [Series("s", "s", 0, points)], Axis("x"), axis))
    markers = [float(circle.get("cy", "nan")) for circle in chart.findall(".//circle")]
    for css, at in zip(("zero", "limit"), markers, strict=True):
        assert float(chart.find(f".//line[@class='{css}']").get("y1")) == pytest.approx(at, abs=0.1)  # type: ignore[union-attr, arg-type]


def test_looks_of_many_series_differ_without_colour() -> None:
    looks = {(dash(look), str(marker(look, 0, 0))) for look in range(24)}
    assert len(looks) >= 20


def lines(*series: Series) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart("t", list(series), Axis("x"), Axis("y")))


def test_line_chart_leaves_out_what_is_not_finite() -> None:
    points = (Point(1, 2.0, "a", 1.5, 2.5), Point(2, math.nan, "b"), Point(3, 4.0, "c", None, None))
    chart = lines(Series("s", "s", 0, points))
    assert len(chart.findall(".//g[@class='pt']")) == 2
    assert "nan" not in ElementTree.tostring(chart, encoding="unicode")


def test_one_point_and_no_point() -> None:
    assert lines(Series("s", "s", 0, (Point(1, 1.0, "only"),))).findall(".//g[@class='pt']")
    assert line_chart("t", [], Axis("x"), Axis("y")) == ""
    assert interval_plot("t", [], Axis("x")) == ""
    assert bars("t", [], [], "x", Axis("y")) == ""


def test_only_the_first_point_is_a_stop_of_the_tab_key() -> None:
    series = [Series(str(i), str(i), i, tuple(Point(x, x * i, "tip") for x in range(3))) for i in range(3)]
    stops = [pt.get("tabindex") for pt in lines(*series).findall(".//g[@class='pt']")]
    assert stops.count("0") == 1
    assert len(stops) == 9


def test_interval_plot_draws_a_row_each() -> None:
    rows = [Row("a", "<a>", 0, 0.5, "50 %", "tip", 0.4, 0.6), Row("b", "b", 1, math.nan, "–", "tip")]
    chart = ElementTree.fromstring(interval_plot("t", [("group & co", rows)], Axis("share")))
    assert len(chart.findall(".//g[@class='pt']")) == 1
    assert "<a>" in [text.text for text in chart.iter("text")]
