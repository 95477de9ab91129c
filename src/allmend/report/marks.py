"""The look of a series: colour, dash and marker shape together, so that none is needed to tell series apart."""

from collections.abc import Sequence
from math import cos, pi, sin

from allmend.report.markup import Html, tag

DASHES = (None, "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2", "14 3 3 3")
NEUTRAL = -1
"""The look of what others are compared with: the base model, the controls."""
LETTER = 6.3
"""Mean width of a letter in the charts' 12 px type (px)."""


def width(words: str) -> float:
    """About how wide words are in a chart, in px."""
    return LETTER * len(words)


def short(name: str, letters: int = 18) -> str:
    """A name cut to fit a chart; the whole name stands in the tables."""
    return name if len(name) <= letters else name[: letters - 1].rstrip() + "…"


def colour(look: int) -> str:
    """CSS class that carries the colour of a look."""
    return "sb" if look == NEUTRAL else f"s{look % len(DASHES)}"


def dash(look: int) -> str | None:
    """Dash pattern of a look's line; looks beyond the last colour differ by pattern and shape."""
    return None if look == NEUTRAL else DASHES[(look + look // len(DASHES)) % len(DASHES)]


def marker(look: int, x: float, y: float, r: float = 4.0, hollow: bool = False) -> Html:
    """A marker at (x, y) px of about radius r px."""
    css = "m hollow" if hollow or look == NEUTRAL else "m"
    shape = 0 if look == NEUTRAL else (look + look // len(DASHES)) % 7
    if shape == 0:
        return tag("circle", cx=x, cy=y, r=r, class_=css)
    if shape == 1:
        return tag("rect", x=x - r * 0.9, y=y - r * 0.9, width=1.8 * r, height=1.8 * r, class_=css)
    if shape == 5:
        arm, out = r * 0.42, r * 1.15
        plus = ((arm, out), (arm, arm), (out, arm), (out, -arm), (arm, -arm), (arm, -out))
        corners = [*plus, *((-a, -b) for a, b in plus)]
    else:
        sides, turn = {2: (3, -90.0), 3: (4, -90.0), 4: (3, 90.0), 6: (5, -90.0)}[shape]
        angles = [(turn + 360 * i / sides) * pi / 180 for i in range(sides)]
        corners = [(1.25 * r * cos(angle), 1.25 * r * sin(angle)) for angle in angles]
    return tag("polygon", points=" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners), class_=css)


def legend(entries: Sequence[tuple[str, str, int]], kind: str = "line", dashed: frozenset[str] = frozenset()) -> Html:
    """Keys of series: `(series, name, look)`. Scripts make them switches; without scripts they are plain keys.

    `kind` is what the chart draws: `line` (with markers), `marker`, or `bar`. Keys in `dashed` are drawn hollow.
    """
    keys = []
    wide = 34 if kind == "line" else 16
    for series, name, look in entries:
        hollow = series in dashed
        stroke = tag("line", x1=1, y1=8, x2=33, y2=8, class_="l", stroke_dasharray="4 3" if hollow else dash(look))
        box = tag("rect", x=3, y=3, width=10, height=10, class_="bar hollow" if hollow else "bar")
        swatch = tag(
            "svg",
            stroke if kind == "line" else None,
            box if kind == "bar" else marker(look, wide / 2, 8, hollow=hollow),
            viewBox=f"0 0 {wide} 16",
            width=wide,
            height=16,
            aria_hidden="true",
            class_=colour(look),
        )
        keys.append(tag("li", tag("button", swatch, name, type="button", disabled=True, data_series=series)))
    return tag("ul", *keys, class_="legend", aria_label="Series")


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to the wanted ones as order, `gap` between neighbours and the bounds allow (px).

    Where the bounds are too narrow for all gaps, the gaps shrink evenly.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [min(max(wanted[i], low), high) for i in order]
    for _ in range(60):  # push neighbours apart evenly until all gaps hold
        moved = 0.0
        for i in range(len(places) - 1):
            lack = gap - (places[i + 1] - places[i])
            if lack > 1e-6:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
                moved = max(moved, lack)
        if moved == 0.0:
            break
    for i, place in enumerate(places):  # what is left, and the bounds, exactly
        places[i] = max(place, low if i == 0 else places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], high if i == len(places) - 1 else places[i + 1] - gap)
    result = [0.0] * len(wanted)
    for place, i in zip(places, order, strict=True):
        result[i] = place
    return result
