"""Histograms: every value is counted once, samples of any size compare, and a far value hides nothing."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report.conftest import EVIL, said, tips

from allmend.report.charts import Axis
from allmend.report.histograms import BINS, Sample, bins, counts, far_out, histograms

values = st.lists(st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3)), min_size=1, max_size=60)


def drawn(*samples: Sample) -> ElementTree.Element:
    return ElementTree.fromstring(histograms("t", samples, Axis("score", reference=0.0)))


def bars(chart: ElementTree.Element, key: str) -> list[ElementTree.Element]:
    return chart.findall(f".//g[@data-series='{key}']//rect[@class='bar']")


@given(st.lists(values, min_size=1, max_size=3))
def test_every_value_is_in_one_bin_and_zero_is_an_edge(samples: list[list[float]]) -> None:
    edges = bins(samples)
    together = [value for sample in samples for value in sample]
    if len(set(together)) == 1:
        assert edges == ()
        return
    assert list(edges) == sorted(set(edges))
    assert 3 <= len(edges) <= 2 * BINS + 2
    assert not edges[0] < 0 < edges[-1] or 0.0 in edges
    found = counts(together, edges)
    assert sum(found) == len(together)
    inside = [value for value in together if edges[0] <= value < edges[-1]]
    for place, (low, high) in enumerate(pairwise(edges)):
        if 0 < place < len(found) - 1:
            assert found[place] == sum(low <= value < high for value in inside)


def test_bars_of_each_sample_add_up_to_the_same() -> None:
    few, many = tuple(float(i) for i in range(-3, 4)), tuple(i / 10 for i in range(-30, 31))
    chart = drawn(Sample("few", "few", 0, few), Sample("many", "many", 1, many))
    heights = {key: sum(float(bar.get("height", "nan")) for bar in bars(chart, key)) for key in ("few", "many")}
    assert heights["few"] == pytest.approx(heights["many"], rel=0.02)
    assert ("n = 7" in said(chart), "n = 61" in said(chart)) == (True, True)
    assert chart.findall(".//line[@class='zero']")


def test_a_far_value_does_not_squeeze_the_others_and_is_told() -> None:
    usual = tuple((i * 37 % 100) / 50 - 1 for i in range(100))
    alone, beside = (Sample("s", "s", 0, some) for some in (usual, (*usual, 1e4)))
    assert not far_out([alone])
    assert far_out([beside])
    assert len(bars(drawn(beside), "s")) > BINS / 4
    assert any("and above" in tip for tip in tips(drawn(beside)))
    # what is far from others is not far out if a whole sample lies there
    apart = Sample("t", "t", 1, tuple(value + 50 for value in usual))
    assert not far_out([alone, apart])


def test_equal_values_have_no_histogram() -> None:
    assert histograms("t", [], Axis("x")) == ""
    assert histograms("t", [Sample("s", "s", 0, (1.0, 1.0))], Axis("x")) == ""


def test_names_are_no_markup_and_one_sample_needs_none() -> None:
    chart = drawn(Sample("s", EVIL, 0, (1.0, 2.0)))
    assert all(tip.startswith(f"{EVIL}\n1 of 2 (") for tip in tips(chart))
    assert not list(chart.iter("script"))
    assert all(tip.startswith("1 of 2 (") for tip in tips(drawn(Sample("s", "", 0, (1.0, 2.0)))))
