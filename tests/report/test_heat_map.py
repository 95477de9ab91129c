"""Heat maps: every cell where its row and column cross, colours that follow the values, and no room for markup."""

import math
import re
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report.conftest import EVIL, said, tips

from allmend.report import numbers
from allmend.report.frame import WIDTH
from allmend.report.heat_map import HeatCell, heat_map, shades

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))


def square(size: int, scale: float = 1.0) -> dict[tuple[int, int], HeatCell]:
    """The upper right half, as of stretches from a start to an end."""
    return {(i, j): HeatCell(scale * (j - i), f"from {i} to {j}") for i in range(size) for j in range(i + 1, size)}


def drawn(names: list[str], cells: dict[tuple[int, int], HeatCell], **more: object) -> ElementTree.Element:
    return ElementTree.fromstring(heat_map("t", names, names, cells, **more))  # type: ignore[arg-type]


def boxes(chart: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The box of each cell by its tooltip."""
    found = {}
    for point in chart.findall(".//g[@class='pt']"):
        title, box = point.find("title"), point.find("rect")
        assert title is not None
        assert box is not None
        found[title.text or ""] = box
    return found


def strength(box: ElementTree.Element) -> float:
    return float(box.get("style", "").removeprefix("--v:").removesuffix("%"))


def test_a_cell_stands_where_its_row_and_column_cross_and_where_there_is_none_it_is_blank() -> None:
    chart = drawn([str(i) for i in range(6)], square(6))
    found = boxes(chart)
    assert found.keys() == {f"from {i} to {j}" for i in range(6) for j in range(i + 1, 6)}
    at = {name: (float(box.get("x", "nan")), float(box.get("y", "nan"))) for name, box in found.items()}
    for i in range(5):
        assert len({at[f"from {i} to {j}"][1] for j in range(i + 1, 6)}) == 1, "a row has one height"
        assert len({at[f"from {k} to {i + 1}"][0] for k in range(i + 1)}) == 1, "a column has one place"
    assert all(left < right for left, right in pairwise(at[f"from 0 to {j}"][0] for j in range(1, 6)))
    assert all(upper < lower for upper, lower in pairwise(at[f"from {i} to 5"][1] for i in range(5)))


@given(st.lists(finite, min_size=1, max_size=20), st.none() | finite)
def test_colours_are_as_strong_as_values_are_far_from_the_middle(values: list[float], middle: float | None) -> None:
    colours = shades(values, middle=middle)
    zero = colours.zero
    by_distance = sorted((abs(value - zero), float(colours.style(value)[4:-1])) for value in values)
    assert all(0 <= strong <= 100 for _, strong in by_distance)
    assert all(weak <= strong for (_, weak), (_, strong) in pairwise(by_distance))
    assert all(("less" in colours.css(value)) == (value < zero) for value in values)
    if middle is not None:
        assert colours.high - middle == pytest.approx(middle - colours.low)
        assert float(colours.style(middle)[4:-1]) == 0
        if len(set(values)) > 1:
            assert by_distance[-1][1] == 100


def test_what_lies_beyond_the_scale_looks_like_its_end_and_the_scale_says_so() -> None:
    cells = {(0, j): HeatCell(value, str(value)) for j, value in enumerate((-9.0, -1.0, 0.5, 1.0))}
    chart = ElementTree.fromstring(
        heat_map("t", ["a"], list("wxyz"), cells, low=-1.0, high=1.0, middle=0.0, quantity="nats")
    )
    found = boxes(chart)
    assert found["-9.0"].get("style") == found["-1.0"].get("style") == "--v:100%"
    assert (found["-9.0"].get("class"), found["1.0"].get("class")) == ("cell less", "cell")
    scale = chart.find(".//g[@class='scale']")
    assert scale is not None
    assert "≤ −1.00" in said(scale)
    assert "≥" not in said(scale)
    assert "nats" in said(scale)


def test_thirty_by_thirty_stay_inside_without_printed_values() -> None:
    names = [str(i) for i in range(30)]
    cells = {(i, j): HeatCell(i - j, f"{i}, {j}") for i in range(30) for j in range(30)}
    chart = drawn(names, cells, middle=0.0, row_name="start", column_name="end", quantity="log perplexity")
    found = boxes(chart)
    assert len(found) == 900
    assert not chart.findall(".//g[@class='pt']/text")
    _, _, wide, tall = map(float, chart.get("viewBox", "").split())
    assert wide == WIDTH
    for box in found.values():
        x, y, width, height = (float(box.get(key, "nan")) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + width <= wide
        assert 0 <= y <= y + height <= tall
        assert min(width, height) > 8
    assert sum(point.get("tabindex") == "0" for point in chart.findall(".//g[@class='pt']")) == 1


def test_values_are_printed_where_all_of_them_fit() -> None:
    cells = {(i, j): HeatCell(i - j, "tip") for i in range(3) for j in range(3)}
    chart = drawn(["a", "b", "c"], cells, middle=0.0, form=numbers.signed)
    printed = [text.text for text in chart.findall(".//g[@class='pt']/text")]
    assert printed == [numbers.signed(cell.value) for cell in cells.values()]
    cells[0, 0] = HeatCell(0.0, "tip", "a figure that is far too long for its cell")
    assert not drawn(["a", "b", "c"], cells).findall(".//g[@class='pt']/text")


@pytest.mark.parametrize("names", [["a", "b"], [f"department of {i}" for i in range(20)]])
def test_names_of_columns_are_there_whether_they_fit_beside_each_other_or_not(names: list[str]) -> None:
    chart = drawn(names, {(i, i): HeatCell(1.0, "tip") for i in range(len(names))})
    labels = [text for text in chart.findall("text") if text.get("class") == "tick"]
    assert [(text.text or "")[:12] for text in labels] == [name[:12] for name in names]
    assert all(("rotate" in text.get("transform", "")) == (len(names) > 2) for text in labels)


def test_what_was_not_measured_is_hatched_and_said() -> None:
    cells = {(0, 0): HeatCell(1.0, "known"), (0, 1): HeatCell(math.nan, "too few records")}
    chart = ElementTree.fromstring(heat_map("t", ["a"], ["b", "c"], cells, missing="nothing told"))
    found = boxes(chart)
    assert found["too few records"].get("class") == "cell none"
    assert len(chart.findall(".//path[@class='hatch']")) == 2, "the cell and the key beside the scale"
    assert "nothing told" in said(chart)
    assert "nan" not in ElementTree.tostring(chart, encoding="unicode")
    whole = ElementTree.fromstring(
        heat_map("t", ["a"], ["b"], {(0, 0): HeatCell(1.0, "known")}, missing="nothing told")
    )
    assert "nothing told" not in said(whole)


def test_one_cell_equal_cells_and_no_cell() -> None:
    assert heat_map("t", [], [], {}) == ""
    assert len(boxes(drawn(["a"], {(0, 0): HeatCell(3.2, "tip")}))) == 1
    for middle in (None, 0.0):
        chart = drawn(["a", "b"], {(i, i): HeatCell(0.0, str(i)) for i in range(2)}, middle=middle)
        assert len({box.get("style") for box in boxes(chart).values()}) == 1


def test_names_and_tips_are_no_markup() -> None:
    chart = drawn([EVIL], {(0, 0): HeatCell(1.0, EVIL, EVIL)}, quantity=EVIL, row_name=EVIL, column_name=EVIL)
    assert tips(chart) == [EVIL]
    assert not list(chart.iter("script"))


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Of two colours in sRGB, as WCAG has it."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("end", ["more", "less"])
def test_ink_is_legible_on_every_shade(theme: int, end: str) -> None:
    css = files("allmend.report").joinpath("page.css").read_text()

    def colour(name: str) -> tuple[float, ...]:
        found = re.search(rf"--{name}: light-dark\(#(\w{{6}}), #(\w{{6}})\)", css)
        assert found
        return tuple(int(found[theme + 1][i : i + 2], 16) / 255 for i in (0, 2, 4))

    for mix in (0.0, 0.5, 1.0):
        shade = tuple(mix * a + (1 - mix) * b for a, b in zip(colour(end), colour("raised"), strict=True))
        assert contrast(shade, colour("ink")) >= 4.5
