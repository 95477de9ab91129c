"""Charts as a file of their own: an SVG that follows its reader's light or dark, as the pages do."""

import re
from collections.abc import Sequence
from importlib.resources import files

from allmend.report.frame import WIDTH, words
from allmend.report.markup import Html

GAP = 30
MARGIN = 20
TITLE = 26.0
"""Room above a chart for its title."""


def picture(charts: Sequence[Html], columns: int = 2, *, titles: Sequence[str] = ()) -> str:
    """Charts side by side, row by row, with the pages' style.

    Args:
        charts: each an `<svg>` with a view box, as this package draws them.
        columns: charts in a row, at most.
        titles: one above each chart; none where there are none.
    """
    columns = min(columns, len(charts))
    above = TITLE if titles else 0.0
    heights = [above + _height(chart) for chart in charts]
    rows = [heights[start : start + columns] for start in range(0, len(charts), columns)]
    parts, y = list[str](), 0.0
    for number, chart in enumerate(charts):
        row, column = divmod(number, columns)
        if column == 0 and row:
            y += max(rows[row - 1]) + GAP
        x = column * (WIDTH + GAP)
        if titles:
            parts.append(words(titles[number], x, y + 14, css="title"))
        tall = heights[number] - above
        parts.append(
            chart.replace("<svg ", f'<svg x="{x}" y="{y + above:.0f}" width="{WIDTH}" height="{tall:.0f}" ', 1)
        )
    wide = columns * (WIDTH + GAP) - GAP + 2 * MARGIN
    high = sum(max(row) for row in rows) + GAP * (len(rows) - 1) + 2 * MARGIN
    style = files("allmend.report").joinpath("page.css").read_text()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-MARGIN} {-MARGIN} {wide} {high:.0f}" width="{wide}">'
        f"<style>{style} .title {{ fill: var(--ink); font-weight: 600; font-size: 15px; }}</style>"
        f'<rect class="paper" x="{-MARGIN}" y="{-MARGIN}" width="{wide}" height="{high:.0f}"/>{"".join(parts)}</svg>\n'
    )


def _height(chart: Html) -> float:
    found = re.search(r'viewBox="0 0 \d+ (\d+)"', chart)
    if found is None:
        raise ValueError("a chart without a view box has no height")
    return float(found[1])
