"""A heat map: a figure for each row and column, as a colour and, where there is room, in print."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allmend.report.frame import WIDTH, point, svg, words
from allmend.report.marks import short, width
from allmend.report.markup import Html, join, tag
from allmend.report.numbers import Format, number

ROW_LETTERS = 24
COLUMN_LETTERS = 14
"""Longest names of rows and of columns."""
WIDEST, TALLEST, LOWEST = 96.0, 26.0, 13.0
"""A cell is no wider, no taller and no lower (px)."""
APART = 14.0
"""Distance of the names of two columns that are written slantwise (px)."""
SLANT = 50
"""Degrees by which names of columns fall where they do not fit beside each other."""
PRINTED = 15.0
"""A cell holds a printed figure from this height on (px)."""
FAINTEST = 0.08
"""Strength of the lower end of a scale of one colour."""
STEPS = 32
"""Of the bar that shows the scale."""


@dataclass(frozen=True)
class HeatCell:
    """A figure of a heat map.

    Attributes:
        value: not a number where it was not measured, which is hatched.
        tip: its words for the tooltip: of what it is a figure, with interval and sample size.
        shown: as printed; None writes the value as the scale is written, and nothing where there is none.
    """

    value: float
    tip: str
    shown: str | None = None


@dataclass(frozen=True)
class Shades:
    """From values to colours: as strong as a value is far from `zero`, the same on either side.

    The lower end of a scale of one colour has a little of it, so that its cells differ from a place without one.

    Attributes:
        low, high: ends of the scale; what lies beyond looks like them.
        zero: the value without colour: the middle of a diverging scale, the lower end of a sequential one.
    """

    low: float
    high: float
    zero: float

    def css(self, value: float) -> str:
        """CSS class of a value's side."""
        return "cell less" if value < self.zero else "cell"

    def style(self, value: float) -> str:
        """How strong its colour is, as CSS."""
        return f"--v:{100 * self.strength(value):.0f}%"

    def strength(self, value: float) -> float:
        """How strong its colour is, in [0, 1]."""
        reach = max(self.high - self.zero, self.zero - self.low)
        held = min(max(value, self.low), self.high)
        faintest = FAINTEST if self.zero == self.low else 0.0
        return faintest + (1 - faintest) * abs(held - self.zero) / reach


def shades(
    values: Sequence[float], *, low: float | None = None, high: float | None = None, middle: float | None = None
) -> Shades:
    """Lay a scale over finite values.

    Args:
        values: to be shown.
        low, high: ends; from the values where None, and then as far from `middle` on either side.
        middle: the value without colour, for a diverging scale.
    """
    if middle is not None:
        reach = max((abs(value - middle) for value in values), default=1.0) or 1.0
        low, high = middle - reach if low is None else low, middle + reach if high is None else high
    else:
        low = min(values, default=0.0) if low is None else low
        high = max(values, default=1.0) if high is None else high
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    return Shades(low, high, low if middle is None else min(max(middle, low), high))


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], HeatCell],
    *,
    low: float | None = None,
    high: float | None = None,
    middle: float | None = None,
    form: Format = number,
    quantity: str = "",
    row_name: str = "",
    column_name: str = "",
    missing: str = "not measured",
) -> Html:
    """Draw a heat map, with the bar of its scale below.

    Figures are printed where the widest of them fits its cell, so that colour is not all that carries them; of 30 × 30
    cells it is, and each has its tooltip.

    Args:
        title: what it is called where it cannot be seen.
        rows: their names, from the top down.
        columns: their names, from left to right.
        cells: by row and column. A place without a cell stays blank: there can be none.
        low: end of the scale; of the values where None. Likewise `high`.
        middle: the value without colour, from which two colours diverge; None for a scale of one colour from `low` on.
        form: how values are written.
        quantity: what the scale is of, with its unit.
        row_name: what the rows are. Likewise `column_name`.
        missing: what a hatched cell means.
    """
    if not rows or not columns or not cells:
        return Html("")
    known = [cell.value for cell in cells.values() if math.isfinite(cell.value)]
    colours = shades(known, low=low, high=high, middle=middle)
    left = max((width(short(name, ROW_LETTERS)) for name in rows), default=0.0) + 14
    wide = min(WIDEST, (WIDTH - left) / len(columns))
    names = [short(name, COLUMN_LETTERS) for name in columns]
    longest = max(map(width, names))
    flat = longest + 6 <= wide or max(map(len, names)) <= 3
    if not flat:  # the first name falls to the left
        left = max(left, longest * math.cos(math.radians(SLANT)) - wide / 2)
        wide = min(WIDEST, (WIDTH - left) / len(columns))
    tall = min(TALLEST, max(LOWEST, wide))
    written = {place: _written(cell, form) for place, cell in cells.items()}
    printed = tall >= PRINTED and max(map(width, written.values())) + 6 <= wide
    top = 20.0 if row_name else 4.0
    bottom = top + tall * len(rows)
    drawn: list[str] = [words(row_name, 0, 12, css="name")] if row_name else []
    for i, name in enumerate(rows):
        drawn.append(words(short(name, ROW_LETTERS), left - 8, top + (i + 0.5) * tall + 4, "end", "row"))
    every = math.ceil((longest + 6 if flat else APART) / wide)
    for j, name in enumerate(names):
        if j % every == 0:
            drawn.append(_column(name, left + (j + 0.5) * wide, bottom, flat=flat))
    for order, ((i, j), cell) in enumerate(sorted(cells.items())):
        x, y = left + j * wide, top + i * tall
        said = words(written[i, j], x + wide / 2, y + tall / 2 + 4, "middle", "held") if printed else None
        drawn.append(point(cell.tip, order == 0, _cell(cell.value, colours, x, y, wide, tall), said))
    under = bottom + (20.0 if flat else 16 + longest * math.sin(math.radians(SLANT)))
    if column_name:
        drawn.append(words(column_name, left + wide * len(columns), under + 12, "end", "name"))
        under += 16
    beyond = [any(value < colours.low for value in known), any(value > colours.high for value in known)]
    ends = [
        f"{sign} {form(end)}" if out else form(end)
        for sign, end, out in zip("≤≥", (colours.low, colours.high), beyond, strict=True)
    ]
    hatched = missing if len(known) < len(cells) else ""
    bar = _bar(colours, ends, form, left, under + 14, quantity, hatched)
    return svg(title, under + (66 if quantity else 50), *drawn, bar)


def scale(title: str, colours: Shades, *, form: Format = number, quantity: str = "") -> Html:
    """The bar of a scale by itself, for colours that stand in something else than a map.

    Args:
        title: what it is called where it cannot be seen.
        colours: of the scale.
        form: how values are written.
        quantity: what the scale is of, with its unit.
    """
    bar = _bar(colours, [form(colours.low), form(colours.high)], form, 0.0, 4.0, quantity, "")
    return svg(title, 56 if quantity else 40, bar)


def _written(cell: HeatCell, form: Format) -> str:
    if cell.shown is not None:
        return cell.shown
    return form(cell.value) if math.isfinite(cell.value) else ""


def _column(name: str, x: float, bottom: float, *, flat: bool) -> Html:
    if flat:
        return words(name, x, bottom + 15, "middle", "tick")
    turn = f"rotate({-SLANT} {x + 4:.1f} {bottom + 11:.1f})"
    return tag("text", name, x=x + 4, y=bottom + 11, text_anchor="end", class_="tick", transform=turn)


def _cell(value: float, colours: Shades, x: float, y: float, wide: float, tall: float) -> Html:
    """A cell, with a hair of paper around it."""
    if not math.isfinite(value):
        return join(
            [
                tag("rect", x=x + 1, y=y + 1, width=wide - 2, height=tall - 2, class_="cell none"),
                _hatch(x + 1, y + 1, wide - 2, tall - 2),
            ]
        )
    return tag(
        "rect",
        x=x + 0.5,
        y=y + 0.5,
        width=wide - 1,
        height=tall - 1,
        class_=colours.css(value),
        style=colours.style(value),
    )


def _hatch(x: float, y: float, wide: float, tall: float) -> Html:
    """Strokes from corner to corner of a box; drawn, since a pattern would need a name that is unique on the page."""
    strokes = []
    for start in range(6 - int(tall), int(wide), 6):
        a, b = max(0.0, start), min(wide, start + tall)
        strokes.append(f"M{x + a:.1f} {y + a - start:.1f}L{x + b:.1f} {y + b - start:.1f}")
    return tag("path", d="".join(strokes), class_="hatch")


def _bar(
    colours: Shades, ends: Sequence[str], form: Format, left: float, top: float, quantity: str, hatched: str
) -> Html:
    """The scale: its colours from end to end with their values, what it is of, and what a hatched cell means."""
    left = min(left, WIDTH / 4)
    long, tall = WIDTH * 0.42, 10.0
    parts: list[str] = []
    if quantity:
        parts.append(words(quantity, left, top + 8, css="name"))
        top += 16
    for step in range(STEPS):
        value = colours.low + (step + 0.5) / STEPS * (colours.high - colours.low)
        x = left + step * long / STEPS
        box = {"x": x, "y": top, "width": long / STEPS + 0.3, "height": tall}
        parts.append(tag("rect", **box, class_=colours.css(value), style=colours.style(value)))
    marks = [(0.0, ends[0]), (1.0, ends[1])]
    if colours.low < colours.zero < colours.high:
        marks.insert(1, ((colours.zero - colours.low) / (colours.high - colours.low), form(colours.zero)))
    for place, said in marks:
        parts.append(
            tag("line", x1=left + place * long, y1=top + tall, x2=left + place * long, y2=top + tall + 4, class_="axis")
        )
        parts.append(words(said, left + place * long, top + tall + 17, "middle", "tick"))
    if hatched:
        x = left + long + 28
        parts += [tag("rect", x=x, y=top - 2, width=14, height=14, class_="cell none"), _hatch(x, top - 2, 14, 14)]
        parts.append(words(hatched, x + 20, top + 9, css="tick"))
    return tag("g", *parts, class_="scale")
