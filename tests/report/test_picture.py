import re
from xml.etree import ElementTree

import pytest

from allmend.report.charts import Axis, Point, Series, line_chart
from allmend.report.markup import Html
from allmend.report.picture import picture


def chart(height: int) -> Html:
    return line_chart(
        "a < b", [Series("a", "a", 0, (Point(0, 1, "x"), Point(1, 2, "y")))], Axis("x"), Axis("y"), height
    )


@pytest.mark.parametrize("titles", [(), ("a & b", "two", "three")])
def test_charts_stand_side_by_side_and_do_not_overlap(titles: tuple[str, ...]) -> None:
    found = picture([chart(200), chart(300), chart(100)], titles=titles)

    root = ElementTree.fromstring(found)
    places = [
        tuple(float(one.attrib[name]) for name in ("x", "y", "width", "height"))
        for one in root
        if one.tag.endswith("svg")
    ]
    assert len(places) == 3
    assert [one.text for one in root if one.tag.endswith("text")] == list(titles)
    x0, y0, wide, high = map(float, root.attrib["viewBox"].split())
    for x, y, w, h in places:
        assert x0 <= x
        assert x + w <= x0 + wide
        assert y0 <= y
        assert y + h <= y0 + high
    for number, (x, y, w, h) in enumerate(places):
        for a, b, c, d in places[number + 1 :]:
            assert x + w <= a or a + c <= x or y + h <= b or b + d <= y


def test_it_needs_nothing_beside_itself() -> None:
    found = picture([chart(200)])

    assert "<style>" in found
    assert "light-dark(" in found
    assert not re.search(r"(href|src)=|url\((?!#)", found)


def test_what_is_no_chart() -> None:
    with pytest.raises(ValueError, match="view box"):
        picture([Html("<svg></svg>")])
