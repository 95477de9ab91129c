"""Histograms one below the other on a common axis: how the values of each sample spread."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import quantiles

from allmend.report import numbers
from allmend.report.axes import Axis, Scale, round_ticks, scale
from allmend.report.charts import ROW_LETTERS
from allmend.report.frame import WIDTH, below, point, svg, words
from allmend.report.marks import colour, short, width
from allmend.report.markup import Html, tag

BINS = 24
"""Bars of a histogram, about."""
FENCES = 3.0
"""Quartile distances beyond the quartiles within which bars stand (Tukey's outer fences); the outermost bars hold what
lies beyond, so that a single far value does not squeeze all others into one bar."""
LOWEST, TALLEST, WHOLE = 46.0, 130.0, 260.0
"""Height of a histogram, at least and at most, and of all together where there are few (px)."""


@dataclass(frozen=True)
class Sample:
    """Values whose spread is shown.

    Attributes:
        key: as of `charts.Series`; so is `look`.
        name: of what they are values; may be empty where there is one sample.
        values: finite ones.
    """

    key: str
    name: str
    look: int
    values: tuple[float, ...]


def bins(samples: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Edges of equal bins, at round values, zero among them if it is between; none where all values are equal.

    They cover all values, except for those that are far out of their own sample (see `FENCES`).
    """
    together = [value for values in samples for value in values]
    if not together or min(together) == max(together):
        return ()
    spans = [_fenced(values) for values in samples if values]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    return round_ticks(low, high, BINS)


def _fenced(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if len(values) < 2:
        return low, high
    first, _, third = quantiles(values, n=4, method="inclusive")
    if third == first:
        return low, high
    reach = FENCES * (third - first)
    return max(low, first - reach), min(high, third + reach)


def counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values each bin has, its lower edge included; the outermost have those beyond, too."""
    found = [0] * (len(edges) - 1)
    for value in values:
        found[min(max(bisect_right(edges, value) - 1, 0), len(found) - 1)] += 1
    return found


def histograms(title: str, samples: Sequence[Sample], axis: Axis) -> Html:
    """Draw a histogram for each sample, in shares of it, so that large and small ones compare; nothing where all values
    are equal.

    Args:
        title: what it is called where it cannot be seen.
        samples: from the top down.
        axis: of the values.
    """
    samples = [sample for sample in samples if sample.values]
    together = [value for sample in samples for value in sample.values]
    edges = bins([sample.values for sample in samples])
    if not edges:
        return Html("")
    named = any(sample.name for sample in samples)
    left = max(width(short(sample.name, ROW_LETTERS)) for sample in samples) + 14 if named else 26.0
    sizes = [f"n = {numbers.count(len(sample.values))}" for sample in samples]
    right = WIDTH - max(width(size) for size in sizes) - 10
    start, end = _shown(edges, axis.reference)
    x = scale(replace(axis, low=start, high=end), together, left, right, about=6, tight=True)
    shares = [[count / len(sample.values) for count in counts(sample.values, edges)] for sample in samples]
    most = max(max(found) for found in shares)
    power = 10.0 ** math.floor(math.log10(most))
    line = max(share for m in (1, 2, 5) if (share := m * power) <= most + 1e-9)
    tall = min(TALLEST, max(LOWEST, WHOLE / len(samples)))
    bottom = 6 + tall * len(samples)
    behind = [tag("line", x1=x(value), y1=6, x2=x(value), y2=bottom, class_="grid") for value in x.ticks]
    if axis.reference is not None and start <= axis.reference <= end:
        at = x(axis.reference)
        behind.append(tag("line", x1=at, y1=6, x2=at, y2=bottom, class_="zero"))
    drawn, first = [], True
    for place, (sample, found) in enumerate(zip(samples, shares, strict=True)):
        base = 6 + tall * (place + 1) - 4
        y = Scale(0.0, most, base, base - (tall - 14), ())
        parts = [
            tag("line", x1=left, y1=y(line), x2=right, y2=y(line), class_="grid"),
            words(numbers.percent(line, 0), right + 6, y(line) + 4, css="tick"),
            tag("line", x1=left, y1=base, x2=right, y2=base, class_="base"),
            words(short(sample.name, ROW_LETTERS), 8 if named else 0, base, css="row"),
            words(sizes[place], WIDTH, base, "end", "tick"),
        ]
        for share, low, high in zip(found, edges, edges[1:], strict=False):
            if share:
                tip = _tip(sample, share, low, high, edges, together)
                box = {"x": x(low) + 0.5, "y": y(share), "width": x(high) - x(low) - 1, "height": base - y(share)}
                parts.append(point(tip, first, tag("rect", **box, class_="bar")))
                first = False
        drawn.append(tag("g", *parts, class_=f"series {colour(sample.look)}", data_series=sample.key))
    return svg(title, bottom + 42, *behind, below(x, axis, bottom), *drawn)


def _shown(edges: Sequence[float], reference: float | None) -> tuple[float, float]:
    """From where to where the axis goes: over all bins, and to the reference where that does not halve their width."""
    low, high = edges[0], edges[-1]
    if reference is not None and low - (high - low) <= reference <= high + (high - low):
        return min(low, reference), max(high, reference)
    return low, high


def _tip(
    sample: Sample, share: float, low: float, high: float, edges: Sequence[float], together: Sequence[float]
) -> str:
    size = len(sample.values)
    ends = f"{numbers.tick(low)} to {numbers.tick(high)}"
    if low == edges[0] and min(together) < low:
        ends = f"below {numbers.tick(high)}"
    if high == edges[-1] and max(together) > high:
        ends = f"{numbers.tick(low)} and above"
    counted = f"{numbers.out_of(round(share * size), size)} ({numbers.percent(share)}), {ends}"
    return f"{sample.name}\n{counted}" if sample.name else counted


def far_out(samples: Sequence[Sample]) -> bool:
    """Whether the outermost bars of `histograms` hold values beyond their edges."""
    together = [value for sample in samples for value in sample.values]
    edges = bins([sample.values for sample in samples])
    return bool(edges) and (min(together) < edges[0] or max(together) > edges[-1])
