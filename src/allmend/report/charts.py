"""Charts as SVG that is complete without scripts: lines with intervals, intervals by row (forest plot), bars.

`page.js` adds tooltips and switches; it finds points by `.pt` and traces by `.trace`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from allmend.report.axes import Axis, Scale, scale
from allmend.report.frame import WIDTH, across, below, point, svg, whisker, words
from allmend.report.marks import NEUTRAL, colour, dash, marker, short, spread, width
from allmend.report.markup import Html, tag

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
        said: of a place on the trace, behind the series' name; {x} and {y} stand for its values.
    """

    key: str
    name: str
    look: int
    points: tuple[Point, ...] = ()
    hollow: bool = False
    trace: tuple[tuple[float, float], ...] = ()
    faint: tuple[tuple[float, float], ...] = ()
    said: str = "{x}\n{y}"


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


def _line(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points if y.has(b))


def _trace(series: Series, x: Scale, y: Scale) -> list[Html]:
    drawn: list[Html] = []
    if series.faint:
        drawn.append(tag("polyline", points=_line(series.faint, x, y), class_="faint"))
    if series.trace:
        known = [(a, b) for a, b in series.trace if y.has(b)]
        drawn.append(
            tag(
                "polyline",
                points=_line(known, x, y),
                class_="l trace",
                stroke_dasharray="4 3" if series.hollow else dash(series.look),
                data_name=series.name or series.key,
                data_said=series.said,
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
        known = [(a, b) for a, b in s.trace if y.has(b)]
        known = known or [(p.x, p.y) for p in s.points if y.has(p.y)]
        return (x(known[-1][0]) + shift.get(id(s), 0.0), y(known[-1][1])) if known else (right, bottom)

    places = spread([last(s)[1] for s in named], LINE, top, bottom)
    groups = []
    for i, s in enumerate(ends):
        known = [p for p in s.points if y.has(p.y)]
        dx = shift.get(id(s), 0.0)
        drawn: list[Html] = _trace(s, x, y)
        if not s.trace and len(known) > 1:
            route = " ".join(f"{x(p.x) + dx:.1f},{y(p.y):.1f}" for p in known)
            pattern = "4 3" if s.hollow else dash(s.look)
            drawn.append(tag("polyline", points=route, class_="l", stroke_dasharray=pattern))
        for j, p in enumerate(known):
            at = x(p.x) + dx
            fork = whisker(y, p.low, p.high, at, upright=True)
            r = 3.4 if s.trace else 4.2
            drawn.append(point(p.tip, i == 0 and j == 0, fork, marker(s.look, at, y(p.y), r, s.hollow)))
        if s in named:
            (from_x, from_y), to_y = last(s), places[named.index(s)]
            led = f"M{from_x + 7:.1f} {from_y:.1f}L{right + 5:.1f} {to_y:.1f}L{right + 9:.1f} {to_y:.1f}"
            drawn.append(tag("path", d=led, class_="lead"))
            drawn.append(words(short(s.name), right + 12, to_y + 4, css="end"))
        groups.append(tag("g", *drawn, class_=f"series {colour(s.look)}", data_series=s.key))
    return svg(title, height, across(y, y_axis, left, right), below(x, x_axis, bottom), *groups)


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
            drawn.append(words(short(name, 44), 0, y + 21, css="group"))
        y += head if name else 6
        for row in lines:
            middle = y + tall / 2
            parts: list[str] = [words(short(row.name, ROW_LETTERS), 8, middle + 4, css="row")]
            if x.has(row.value):
                fork = whisker(x, row.low, row.high, middle, upright=False)
                parts.append(point(row.tip, first, fork, marker(row.look, x(row.value), middle, 4.6, row.hollow)))
                first = False
            parts.append(words(row.shown, WIDTH, middle + 4, "end", "figure"))
            drawn.append(tag("g", *parts, class_=f"series {colour(row.look)}", data_series=row.key))
            y += tall
    return svg(title, bottom + 42, *behind, below(x, axis, bottom), *drawn)


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
            parts.append(point(f"{name}, {x_name} {places[j]}\n{y_axis.form(value)}", i == 0 and j == 0, box))
        drawn.append(tag("g", *parts, class_=f"series {colour(look)}", data_series=key))
    named = Axis(x_name, form=lambda value: places[int(value)])
    return svg(title, height, across(y, y_axis, left, WIDTH), below(x, named, bottom), *drawn)


__all__ = ["NEUTRAL", "Axis", "Point", "Row", "Series", "bars", "interval_plot", "line_chart"]
