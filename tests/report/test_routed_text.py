"""Coloured texts: nothing is lost on the way to page and picture, and colours are those of the weights."""

import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from allmend.report.frame import WIDTH
from allmend.report.routed_text import (
    ADVANCE,
    Piece,
    RoutedText,
    in_words,
    shades_of,
    text_block,
    text_picture,
    write_text_page,
)

SVG = "{http://www.w3.org/2000/svg}"


def text(*pieces: tuple[str, float], title: str = "north", layer: int | None = None, left_out: int = 0) -> RoutedText:
    return RoutedText(title, layer, tuple(Piece(words, mass) for words, mass in pieces), left_out)


def boxes(picture: str) -> list[tuple[float, float, float, str]]:
    """x, y, width and words of each token."""
    found = []
    for group in ElementTree.fromstring(picture).iter(f"{SVG}g"):
        box, words = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        if box is not None and group.find(f"{SVG}title") is not None:
            x, y, wide = (float(box.attrib[key]) for key in ("x", "y", "width"))
            found.append((x, y, wide, "" if words is None else words.text or ""))
    return found


@given(st.lists(st.tuples(st.text(alphabet="ab <&\n日é ", min_size=1, max_size=6), st.floats(0, 1)), min_size=1))
def test_a_block_holds_the_whole_text(pieces: list[tuple[str, float]]) -> None:
    one = text(*pieces)
    block = text_block(one, shades_of([one]))
    inside = re.sub(r"<[^>]*>", "", block)
    assert unescape(inside) == "".join(words for words, _ in pieces)


@given(
    st.lists(st.tuples(st.text(alphabet="abc \n日", min_size=1, max_size=90), st.floats(0, 1)), min_size=1, max_size=12)
)
@example([("a" * 200 + "日" * 70, 0.5)])
def test_a_picture_holds_every_letter_within_its_width_and_no_two_in_one_place(pieces: list[tuple[str, float]]) -> None:
    found = boxes(text_picture([text(*pieces)]))
    written = "".join("".join(words for *_, words in found).split())
    assert written == "".join("".join(words for words, _ in pieces).split())
    assert all(x + wide <= WIDTH + ADVANCE / 2 for x, _, wide, _ in found)
    for (x, y, wide, _), (next_x, next_y, _, _) in pairwise(found):
        assert next_y > y or (next_y == y and next_x >= x + wide - 0.11)


def test_the_space_between_two_lines_is_left_out() -> None:
    found = boxes(text_picture([text(("a" * 60, 0.2), (" word", 0.8), (" b", 0.8))]))
    assert [(x, words) for x, _, _, words in found] == [
        (0, "a" * 60),
        (0, "word"),
        (pytest.approx(4 * ADVANCE, abs=0.1), "b"),
    ]
    assert found[1][2] == pytest.approx(4 * ADVANCE, abs=0.1)


def test_colours_are_those_of_the_weights() -> None:
    one = text(("a", 0.0), ("b", 0.5), ("c", 0.75), ("d", 1.0))
    styles = re.findall(r'class="(cell[^"]*)" style="--v:(\d+)%"', text_block(one, shades_of([one])))
    assert styles == [("cell less", "100"), ("cell", "0"), ("cell", "50"), ("cell", "100")]


def test_texts_that_stand_together_have_one_scale() -> None:
    weak, strong = text(("a", 0.6)), text(("b", 1.0))
    (style,) = re.findall(r"--v:(\d+)%", text_block(weak, shades_of([weak, strong])))
    assert int(style) == 20


def test_what_is_shown_is_told() -> None:
    assert in_words(text(("a", 0.2), ("b", 0.6))) == (
        "Weight of the generalists (mean over layers): 0.40 on average, from 0.20 to 0.60."
    )
    words = in_words(text(("a", 0.2), layer=7, left_out=3))
    assert "(layer 7)" in words
    assert words.endswith("The last 3 tokens are left out.")


def test_the_page_has_each_member_and_says_which_layer(tmp_path: Path) -> None:
    texts = [text(("<b>", 0.2), title=name, layer=4) for name in ("north", "south")]
    page = write_text_page(tmp_path / "page.html", texts, of="note.txt", whose="first").read_text()
    assert all(f">{name}</h2>" in page for name in ("north", "south"))
    assert "<dd>layer 4</dd>" in page
    assert "&lt;b&gt;" in page
    assert "specialists ← weight of the generalists → generalists" in page
