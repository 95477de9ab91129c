"""HTML and SVG from Python values. Text is escaped unless it is `Html` already, so nothing can forget to."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

_EMPTY = frozenset(("circle", "rect", "line", "path", "polyline", "polygon", "meta", "link", "br"))
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
"""What XML does not allow, and marks that turn the direction of the text around them."""


class Html(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


def text(value: str) -> Html:
    """`value` as it may stand between tags or in an attribute."""
    return Html(escape(_FORBIDDEN.sub("\ufffd", value)).replace("\n", "&#10;"))


def join(parts: Iterable[str | None]) -> Html:
    """Parts one after the other; those that are not `Html` are escaped, None is left out."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts if part is not None))


def tag(name: str, *children: str | None, **attributes: str | float | bool | None) -> Html:
    """An element. `class_` stands for class, `data_x` for data-x; None and False leave an attribute out."""
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        if isinstance(value, float):
            value = f"{value:.1f}".removesuffix(".0")
        shown = "" if value is True else text(str(value))
        written.append(f' {key.rstrip("_").replace("_", "-")}="{shown}"')
    opening = f"<{name}{''.join(written)}"
    return Html(f"{opening}/>" if name in _EMPTY else f"{opening}>{join(children)}</{name}>")


def code(value: str) -> Html:
    """Something to type, or a name in a file."""
    return tag("code", value)


def prose(words: str) -> Html:
    """A sentence in which what stands between backticks is something to type."""
    return join(code(part) if i % 2 else part for i, part in enumerate(words.split("`")))


@dataclass(frozen=True)
class Cell:
    """A figure in a table: as shown, the smaller words under it, and the value to sort by."""

    shown: str
    under: str = ""
    value: float | None = None


WORDY = 40
"""Letters from which on a cell of words is kept wide, so that it does not become a column of single words."""

Rows = list[list[str | Cell]]


def table(caption: str, head: Sequence[str], rows: Rows) -> Html:
    """A table whose first column names the row. Columns that hold a `Cell` are set as figures."""
    if not rows:
        return Html("")
    figures = [any(isinstance(row[i], Cell) for row in rows) for i in range(len(head))]
    heads = [tag("th", name, scope="col", class_="num" if figures[i] else None) for i, name in enumerate(head)]
    lines = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            cell = cell if isinstance(cell, Cell) else Cell(cell)
            under = tag("small", cell.under) if cell.under else None
            value = repr(float(cell.value)) if cell.value is not None and isfinite(cell.value) else None
            kind, scope = ("th", "row") if i == 0 else ("td", None)
            wordy = len(cell.shown) > WORDY and not isinstance(cell.shown, Html)
            css = "num" if figures[i] else "wordy" if wordy else None
            cells.append(tag(kind, cell.shown, under, scope=scope, class_=css, data_v=value))
        lines.append(tag("tr", *cells))
    whole = tag("table", tag("caption", tag("span", caption)), tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)


def details(summary: str, *children: str) -> Html:
    """Something to unfold; printed as it stands."""
    return tag("details", tag("summary", summary), *children)


def in_figures(whole: Html, rows: int) -> Html:
    """A long table, to unfold."""
    return details(f"In figures ({rows:,} {'row' if rows == 1 else 'rows'})", whole) if whole else whole


def measure(title: str, headline: str, *children: str | None) -> Html:
    """A measure to unfold, whose main figure is read without unfolding it."""
    return tag("details", tag("summary", tag("strong", title), " ", tag("span", headline)), *children, class_="measure")


def paragraph(*parts: str, class_: str | None = None) -> Html:
    """Words."""
    return tag("p", *parts, class_=class_)


def terms(pairs: Iterable[tuple[str, str]]) -> Html:
    """Terms and what they are here, a line each."""
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", value)) for term, value in pairs), class_="layers")


def listed(sentences: Iterable[str]) -> Html:
    """Sentences one below the other; nothing without any."""
    items = [tag("li", sentence) for sentence in sentences]
    return tag("ul", *items, class_="limits") if items else Html("")


def section(name: str, title: str, *children: str | None) -> Html:
    """A part of the page with its heading; `name` is its anchor."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def figure(title: str, *children: str | None, note: str | None = None) -> Html:
    """A chart with its caption above and, under it, how to read it."""
    caption = tag("figcaption", tag("strong", title), tag("span", note) if note else None)
    return tag("figure", caption, *children)
