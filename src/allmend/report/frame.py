"""What every chart stands in: the drawing, its axes and words, and figures that can be pointed at.

Every chart is drawn for a column of `WIDTH` px, narrow enough for a telephone; several stand side by side
where there is room. `page.js` adds tooltips; it finds points by `.pt`.
"""

from allmend.report.axes import Axis, Scale, fitting
from allmend.report.marks import width
from allmend.report.markup import Html, join, tag

WIDTH = 440


def svg(title: str, height: float, *children: str | None) -> Html:
    """The drawing; `title` is what it is called where it cannot be seen."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        class_="chart",
        role="group",
        aria_label=title,
    )


def words(said: str, x: float, y: float, anchor: str = "start", css: str | None = None) -> Html:
    """A line of words whose start, middle or end is at (x, y)."""
    return tag("text", said, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=css)


def point(tip: str, first: bool, *children: str | None) -> Html:
    """A figure that can be pointed at and, by the arrow keys, focused; scripts turn its title into a tooltip.

    Args:
        tip: what it says.
        first: whether the tab key stops here; of a chart, one figure is the first.
        children: what is drawn; `page.js` points at a `.m`, `.bar` or `.cell` among it.
    """
    return tag("g", tag("title", tip), *children, class_="pt", tabindex=0 if first else -1, role="img")


def whisker(along: Scale, low: float | None, high: float | None, at: float, upright: bool) -> Html | None:
    """An interval with end strokes, `at` px on the other axis; None where an end is unknown."""
    if low is None or high is None or not (along.has(low) and along.has(high)):
        return None
    x1, y1, x2, y2 = (at, along(low), at, along(high)) if upright else (along(low), at, along(high), at)
    a, b = (3.5, 0.0) if upright else (0.0, 3.5)
    ends = "".join(f"M{x - a:.1f} {y - b:.1f}L{x + a:.1f} {y + b:.1f}" for x, y in ((x1, y1), (x2, y2)))
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}{ends}", class_="ci")


def across(y: Scale, axis: Axis, left: float, right: float) -> Html:
    """Horizontal grid lines with their labels, and the quantity's name above them."""
    lines: list[str] = []
    for value in y.ticks:
        css = "zero" if value == axis.reference else "grid"
        lines.append(tag("line", x1=left, y1=y(value), x2=right, y2=y(value), class_=css))
        lines.append(words(axis.form(value), left - 7, y(value) + 4, "end", "tick"))
    if axis.reference is not None and axis.reference not in y.ticks:
        at = y(axis.reference)
        lines.append(tag("line", x1=left, y1=at, x2=right, y2=at, class_="zero"))
    if axis.limit is not None:
        at = y(axis.limit)
        lines.append(tag("line", x1=left, y1=at, x2=right, y2=at, class_="limit"))
    return join([*lines, words(axis.label, 0, 12, css="name")])


def below(x: Scale, axis: Axis, at: float) -> Html:
    """The horizontal axis: line, ticks, labels, name."""
    room = abs(x.end - x.start) / (width(max((axis.form(v) for v in x.ticks), key=len)) + 12)
    labelled = fitting(x.ticks, int(room))
    parts = [tag("line", x1=x.start, y1=at, x2=x.end, y2=at, class_="axis")]
    for value in x.ticks:
        if value in labelled:
            parts.append(tag("line", x1=x(value), y1=at, x2=x(value), y2=at + 4, class_="axis"))
            parts.append(words(axis.form(value), x(value), at + 18, "middle", "tick"))
    return join([*parts, words(axis.label, x.end, at + 34, "end", "name")])
