"""Charts as SVG that is complete without scripts: lines with intervals, intervals by row (forest plot), bars.

Every chart is drawn for a column of `WIDTH` px, narrow enough for a telephone; several stand side by side
where there is room. `page.js` adds tooltips and switches; it finds points by `.pt` and traces by `.trace`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from allmend.report.axes import Axis, Scale, fitting, scale
from allmend.report.marks import NEUTRAL, colour, dash, marker, short, spread, width
from allmend.report.markup import Html, join, tag

WIDTH = 440
ROW_LETTERS = 24
"""Longest name of a row of an interval plot."""
LINE = 15
"""Distance of two lines of small type, px."""


@dataclass(frozen=True)
class Point:
    """A figure at `x` with its 95 % interval, and its words for the tooltip."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points joined by a line.

    Attributes:
        key: what the legend switches; series may share it.
        name: for the legend and the end of the line; an empty one is not written there.
        look: see `marks`.
        hollow: drawn dashed, with hollow markers (controls).
        trace: a finer line without markers, as (x, y); drawn instead of joining the points.
        faint: an even finer one behind it, not smoothed.
    """

    key: str
    name: str
    look: int
    points: tuple[Point, ...] = ()
    hollow: bool = False
    trace: tuple[tuple[float, float], ...] = ()
    faint: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of an interval plot: a marker with its interval and the figure in words. A row without value is blank."""

    key: str
    name: str
    look: int
    value: float
    shown: str
    tip: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False


def _svg(title: str, height: float, *children: str | None) -> Html:
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        class_="chart",
        role="group",
        aria_label=title,
    )


def _words(words: str, x: float, y: float, anchor: str = "start", css: str | None = None) -> Html:
    return tag("text", words, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=css)


def _point(tip: str, first: bool, *children: str | None) -> Html:
    """A figure that can be pointed at and, by the arrow keys, focused; scripts turn its title into a tooltip."""
    return tag("g", tag("title", tip), *children, class_="pt", tabindex=0 if first else -1, role="img")


def _whisker(along: Scale, low: float | None, high: float | None, at: float, upright: bool) -> Html | None:
    """An interval with end strokes, `at` px on the other axis; None where an end is unknown."""
    if low is None or high is None or not math.isfinite(low + high):
        return None
    x1, y1, x2, y2 = (at, along(low), at, along(high)) if upright else (along(low), at, along(high), at)
    a, b = (3.5, 0.0) if upright else (0.0, 3.5)
    ends = "".join(f"M{x - a:.1f} {y - b:.1f}L{x + a:.1f} {y + b:.1f}" for x, y in ((x1, y1), (x2, y2)))
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}{ends}", class_="ci")


def _across(y: Scale, axis: Axis, left: float, right: float) -> Html:
    """Horizontal grid lines with their labels, and the quantity's name above them."""
    lines: list[str] = []
    for value in y.ticks:
        css = "zero" if value == axis.reference else "grid"
        lines.append(tag("line", x1=left, y1=y(value), x2=right, y2=y(value), class_=css))
        lines.append(_words(axis.form(value), left - 7, y(value) + 4, "end", "tick"))
    if axis.reference is not None and axis.reference not in y.ticks:
        at = y(axis.reference)
        lines.append(tag("line", x1=left, y1=at, x2=right, y2=at, class_="zero"))
    if axis.limit is not None:
        at = y(axis.limit)
        lines.append(tag("line", x1=left, y1=at, x2=right, y2=at, class_="limit"))
    return join([*lines, _words(axis.label, 0, 12, css="name")])


def _below(x: Scale, axis: Axis, at: float) -> Html:
    """The horizontal axis: line, ticks, labels, name."""
    room = abs(x.end - x.start) / (width(max((axis.form(v) for v in x.ticks), key=len)) + 12)
    labelled = fitting(x.ticks, int(room))
    parts = [tag("line", x1=x.start, y1=at, x2=x.end, y2=at, class_="axis")]
    for value in x.ticks:
        if value in labelled:
            parts.append(tag("line", x1=x(value), y1=at, x2=x(value), y2=at + 4, class_="axis"))
            parts.append(_words(axis.form(value), x(value), at + 18, "middle", "tick"))
    return join([*parts, _words(axis.label, x.end, at + 34, "end", "name")])


def _line(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points if math.isfinite(b))


def _trace(series: Series, x: Scale, y: Scale) -> list[Html]:
    drawn: list[Html] = []
    if series.faint:
        drawn.append(tag("polyline", points=_line(series.faint, x, y), class_="faint"))
    if series.trace:
        known = [(a, b) for a, b in series.trace if math.isfinite(b)]
        drawn.append(
            tag(
                "polyline",
                points=_line(known, x, y),
                class_="l trace",
                stroke_dasharray=dash(series.look),
                data_name=series.name,
                data_x=" ".join(f"{a:.6g}" for a, _ in known),
                data_y=" ".join(f"{b:.4g}" for _, b in known),
            )
        )
    return drawn


def line_chart(title: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis, height: int = 250) -> Html:
    """Lines over x with intervals where points have them, named at their ends.

    Series are moved sideways by a few pixels where intervals would lie on one another.
    """
    ends = [s for s in series if s.points or s.trace or s.faint]
    if not ends:
        return Html("")
    ys = [v for s in ends for p in s.points for v in (p.y, p.low, p.high) if v is not None]
    ys += [b for s in ends for _, b in (*s.trace, *s.faint)]
    y_forked = any(p.low is not None for s in ends for p in s.points)
    xs = [p.x for s in ends for p in s.points] + [a for s in ends for a, _ in (*s.trace, *s.faint)]
    top, bottom = 30.0, height - 42.0
    y = scale(y_axis, ys, bottom, top)
    left = max(width(y_axis.form(value)) for value in y.ticks) + 10
    named = [s for s in ends if s.name]
    right = WIDTH - min(150.0, max((width(short(s.name)) for s in named), default=0) + 24)
    inset = 0 if x_axis.ordinal else 18 if y_forked else 6
    x = scale(x_axis, xs, left + inset, right - inset, about=5, tight=True)
    forked = [s for s in ends if any(p.low is not None for p in s.points)]
    step = min(8.0, 40.0 / max(1, len(forked)))
    shift = {id(s): (i - (len(forked) - 1) / 2) * step for i, s in enumerate(forked)}

    def last(s: Series) -> tuple[float, float]:
        known = [(a, b) for a, b in s.trace if math.isfinite(b)]
        known = known or [(p.x, p.y) for p in s.points if math.isfinite(p.y)]
        return (x(known[-1][0]) + shift.get(id(s), 0.0), y(known[-1][1])) if known else (right, bottom)

    places = spread([last(s)[1] for s in named], LINE, top, bottom)
    groups = []
    for i, s in enumerate(ends):
        known = [p for p in s.points if math.isfinite(p.y)]
        dx = shift.get(id(s), 0.0)
        drawn: list[Html] = _trace(s, x, y)
        if not s.trace and len(known) > 1:
            route = " ".join(f"{x(p.x) + dx:.1f},{y(p.y):.1f}" for p in known)
            pattern = "4 3" if s.hollow else dash(s.look)
            drawn.append(tag("polyline", points=route, class_="l", stroke_dasharray=pattern))
        for j, p in enumerate(known):
            at = x(p.x) + dx
            fork = _whisker(y, p.low, p.high, at, upright=True)
            r = 3.4 if s.trace else 4.2
            drawn.append(_point(p.tip, i == 0 and j == 0, fork, marker(s.look, at, y(p.y), r, s.hollow)))
        if s in named:
            (from_x, from_y), to_y = last(s), places[named.index(s)]
            led = f"M{from_x + 7:.1f} {from_y:.1f}L{right + 5:.1f} {to_y:.1f}L{right + 9:.1f} {to_y:.1f}"
            drawn.append(tag("path", d=led, class_="lead"))
            drawn.append(_words(short(s.name), right + 12, to_y + 4, css="end"))
        groups.append(tag("g", *drawn, class_=f"series {colour(s.look)}", data_series=s.key))
    return _svg(title, height, _across(y, y_axis, left, right), _below(x, x_axis, bottom), *groups)


def interval_plot(title: str, groups: Sequence[tuple[str, Sequence[Row]]], axis: Axis) -> Html:
    """Figures with their intervals, a row each under the heading of its group, and in words on the right."""
    rows = [row for _, lines in groups for row in lines]
    if not rows:
        return Html("")
    values = [v for row in rows for v in (row.value, row.low, row.high) if v is not None]
    left = max(width(short(row.name, ROW_LETTERS)) for row in rows) + 14
    right = WIDTH - max(width(row.shown) for row in rows) - 14
    x = scale(axis, values, left + 6, right - 6, about=5)
    tall, head = 20.0, 30.0
    bottom = 6 + sum((head if name else 6) + tall * len(lines) for name, lines in groups) + 4
    behind: list[Html] = []
    strong = [] if axis.reference is None else [axis.reference]
    for value in dict.fromkeys((*x.ticks, *strong)):
        css = "zero" if value == axis.reference else "grid"
        behind.append(tag("line", x1=x(value), y1=head if groups[0][0] else 4.0, x2=x(value), y2=bottom, class_=css))
    drawn: list[Html] = []
    y, first = 6.0, True
    for name, lines in groups:
        if name:
            behind.append(tag("rect", x=0, y=y + 6, width=right, height=20, class_="paper"))
            drawn.append(_words(short(name, 44), 0, y + 21, css="group"))
        y += head if name else 6
        for row in lines:
            middle = y + tall / 2
            parts: list[str] = [_words(short(row.name, ROW_LETTERS), 8, middle + 4, css="row")]
            if math.isfinite(row.value):
                fork = _whisker(x, row.low, row.high, middle, upright=False)
                parts.append(_point(row.tip, first, fork, marker(row.look, x(row.value), middle, 4.6, row.hollow)))
                first = False
            parts.append(_words(row.shown, WIDTH, middle + 4, "end", "figure"))
            drawn.append(tag("g", *parts, class_=f"series {colour(row.look)}", data_series=row.key))
            y += tall
    return _svg(title, bottom + 42, *behind, _below(x, axis, bottom), *drawn)


def bars(
    title: str,
    places: Sequence[str],
    series: Sequence[tuple[str, str, int, Sequence[float]]],
    x_name: str,
    y_axis: Axis,
    height: int = 220,
) -> Html:
    """Bars side by side at each place; `series` are (key, name, look, values). Every second series is hollow."""
    if not places or not series:
        return Html("")
    top, bottom = 30.0, height - 42.0
    y = scale(y_axis, [v for *_, values in series for v in values] + [0.0], bottom, top, about=4)
    left = max(width(y_axis.form(value)) for value in y.ticks) + 10
    x = scale(Axis(x_name, ticks=tuple(map(float, range(len(places)))), ordinal=True), (), left, WIDTH)
    thick = min(26.0, 0.72 * (WIDTH - left) / len(places) / len(series))
    drawn = []
    for i, (key, name, look, values) in enumerate(series):
        parts = []
        for j, value in enumerate(values):
            at = x(float(j)) + (i - len(series) / 2) * thick + 1
            box = tag(
                "rect",
                x=at,
                y=y(value),
                width=max(1.0, thick - 2),
                height=max(0.5, bottom - y(value)),
                class_="bar hollow" if i % 2 else "bar",
            )
            parts.append(_point(f"{name}, {x_name} {places[j]}\n{y_axis.form(value)}", i == 0 and j == 0, box))
        drawn.append(tag("g", *parts, class_=f"series {colour(look)}", data_series=key))
    named = Axis(x_name, form=lambda value: places[int(value)])
    return _svg(title, height, _across(y, y_axis, left, WIDTH), _below(x, named, bottom), *drawn)


__all__ = ["NEUTRAL", "Axis", "Point", "Row", "Series", "bars", "interval_plot", "line_chart"]
