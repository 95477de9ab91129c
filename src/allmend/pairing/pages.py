"""Pages and pictures of a scan and of a search."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allmend import __version__
from allmend.depth.frontier import Frontier, Line
from allmend.depth.measure import SEQUENTIAL
from allmend.depth.scan import WORDS
from allmend.report import numbers
from allmend.report.charts import Axis, Point, Series, line_chart
from allmend.report.heat_map import HeatCell, heat_map
from allmend.report.markup import Cell, Html, Rows, figure, join, paragraph, section, table, tag
from allmend.report.page import fill, head_of
from allmend.report.picture import picture
from allmend.results import Estimate
from allmend.run import write_atomic

if TYPE_CHECKING:
    from allmend.pairing.folders import Scanned, Searched

PAGE = "depth.html"

DARKEST = 0.5
"""Nats a token beyond which cells look alike: the model is broken there."""

BEST = 10
"""Stretches of a kind that the page lists."""

ADDED = "added to the loss (nats a token)"

LIMITS = (
    "Side by side, the same arithmetic is done and the same weights are read: it gains only where a step waits, for "
    "the launch of a kernel on a GPU, for other GPUs under tensor parallelism, for threads. On a CPU that is little. "
    "Perplexity falls apart before choices do; what is chosen here is for text like the one it was measured on."
)


def write_scan_pages(out: Path, found: "Scanned") -> Path:
    """Write `scan.svg` and `depth.html`, and return the page's path.

    Raises:
        UserError: the operating system refused.
    """
    kinds = list(dict.fromkeys(cell.kind for cell in found.cells))
    maps = {kind: _map(kind, found) for kind in kinds}
    write_atomic(out / "scan.svg", picture(list(maps.values()), titles=[_title(kind) for kind in kinds]).encode())
    page = fill(
        title="depth · allmend",
        head=head_of(
            "Allmend, depth of a model",
            "Which layers could run otherwise",
            [
                ("Model", found.model),
                ("Layers", numbers.count(found.layers)),
                ("Text", found.text),
                ("Loss as it is", f"{found.loss:.3f} nats a token"),
                ("Allmend", __version__),
            ],
        ),
        contents=[(kind, _title(kind)) for kind in kinds],
        summary=_scan_summary(found, kinds),
        sections=[_kind(kind, maps[kind], found) for kind in kinds],
    )
    write_atomic(out / PAGE, page.encode())
    return out / PAGE


def span(start: int, end: int) -> str:
    """The layers start … end − 1 in few words: `4` or `4 to 7`."""
    return str(start) if end - start == 1 else f"{start} to {end - 1}"


def named_layers(start: int, end: int) -> str:
    """The same with what they are."""
    return f"layer{'s' * (end - start > 1)} {span(start, end)}"


def _title(kind: str) -> str:
    words = WORDS[kind]
    return words[0].upper() + words[1:]


def _map(kind: str, found: "Scanned") -> Html:
    cells = {}
    for cell in found.cells:
        if cell.kind == kind:
            tip = (
                f"{named_layers(cell.start, cell.end)}, {WORDS[kind]}\n{numbers.signed(cell.added)} nats a token "
                f"(standard error {numbers.number(cell.error)}, {numbers.count(cell.tokens)} tokens)\n"
                f"{cell.depth} steps left"
            )
            cells[cell.start, cell.end] = HeatCell(cell.added, tip)
    names = [str(layer) for layer in range(found.layers + 1)]
    return heat_map(
        f"{_title(kind)}: {ADDED}",
        names[:-1],
        names,
        cells,
        low=0.0,
        high=DARKEST,
        quantity=f"{ADDED}, {DARKEST:g} and more alike",
        row_name="first layer",
        column_name="layer after the last",
    )


def _scan_summary(found: "Scanned", kinds: Sequence[str]) -> Html:
    words = []
    for kind in kinds:
        some = [cell for cell in found.cells if cell.kind == kind]
        best = min(some, key=lambda cell: (cell.added, cell.start))
        words.append(
            paragraph(
                f"{_title(kind)}: cheapest {'is' if best.end - best.start == 1 else 'are'} "
                f"{named_layers(best.start, best.end)} with "
                f"{numbers.signed(best.added)} nats a token (standard error {numbers.number(best.error)}), which "
                f"leaves {numbers.counted(best.depth, 'step')} of {found.layers}."
            )
        )
    return join(
        [
            paragraph(
                f"What it adds to the model’s loss when a stretch of layers does not run one after the other: "
                f"{numbers.count(len(found.cells))} stretches. A stretch that was clearly behind others of its length "
                "was measured on the first windows of the text only."
            ),
            *words,
            *(paragraph(note, class_="missing") for note in found.notes),
            paragraph(LIMITS),
        ]
    )


def _kind(kind: str, drawn: Html, found: "Scanned") -> Html:
    some = sorted((cell for cell in found.cells if cell.kind == kind), key=lambda cell: cell.added)
    rows: Rows = [
        [
            span(cell.start, cell.end),
            Cell(str(cell.depth), value=cell.depth),
            Cell(numbers.signed(cell.added), value=cell.added),
            Cell(numbers.number(cell.error), value=cell.error),
            Cell(numbers.count(cell.tokens), value=cell.tokens),
        ]
        for cell in some[:BEST]
    ]
    return section(
        kind,
        _title(kind),
        tag("div", figure("By first and last layer", drawn), class_="charts"),
        table(
            f"The {len(rows)} cheapest stretches",
            ["Layers", "Steps left", "Added to the loss (nats a token)", "Standard error", "Tokens"],
            rows,
        ),
    )


def write_search_pages(out: Path, found: "Searched") -> Path:
    """Write `loss_by_depth.svg` and `depth.html`, and return the page's path.

    Raises:
        UserError: the operating system refused.
    """
    front = found.frontier
    curve = _curve(front)
    write_atomic(out / "loss_by_depth.svg", picture([curve]).encode())
    before = front.lines[0]
    page = fill(
        title="depth · allmend",
        head=head_of(
            "Allmend, depth of a model",
            "What fewer steps cost",
            [
                ("Model", found.model),
                ("Layers", numbers.count(before.depth)),
                ("Searched on", f"{front.searched_on} ({numbers.counted(front.search_tokens, 'token')})"),
                ("Reported on", f"{front.reported_on} ({numbers.counted(front.report_tokens, 'token')})"),
                ("Allmend", __version__),
            ],
        ),
        contents=[("depths", "By depth"), ("plan", "The plan")],
        summary=_search_summary(found),
        sections=[_depths(front, curve), _plan(found)],
    )
    write_atomic(out / PAGE, page.encode())
    return out / PAGE


def _curve(front: Frontier) -> Html:
    before, *after = front.lines

    def points(of: str) -> tuple[Point, ...]:
        found = []
        for line in reversed(after):
            one: Estimate | None = getattr(line, of)
            if one is not None:
                evidence = numbers.evidence(one, numbers.signed)
                tip = f"{line.depth} steps\n{numbers.signed(one.value)} nats a token, {evidence}"
                found.append(Point(float(line.depth), one.value, tip, one.low, one.high))
        return tuple(found)

    series = [
        Series("added", "unseen text", 0, points("added")),
        Series("searched", "text of the search", 1, points("searched"), hollow=True),
    ]
    if summed := [line for line in after if line.predicted is not None]:
        guess = tuple(
            Point(float(line.depth), line.predicted or 0.0, f"{line.depth} steps\nsum of single pairs")
            for line in reversed(summed)
        )
        series.append(Series("predicted", "single pairs", 2, guess, hollow=True))
    ticks = tuple(float(line.depth) for line in reversed(after))
    return line_chart(
        f"{ADDED}, by depth",
        series,
        Axis(f"steps one after the other (the model as it is: {before.depth})", ticks=ticks),
        Axis(ADDED, reference=0.0),
    )


def _search_summary(found: "Searched") -> Html:
    depth = found.chosen.depth
    front = found.frontier
    line = next((line for line in front.lines[1:] if line.depth == depth), None)
    if line is None or line.added is None:
        return paragraph("Nothing was found.")
    before = front.lines[0]
    said = [
        f"With {depth} steps instead of {before.depth} the perplexity on unseen text is "
        f"{line.perplexity.value:.1f} instead of {before.perplexity.value:.1f}: {numbers.signed(line.added.value)} "
        f"nats a token ({numbers.evidence(line.added, numbers.signed)})."
    ]
    if line.accuracy is not None and before.accuracy is not None and line.accuracy_change is not None:
        said.append(
            f"Of {numbers.counted(front.questions, 'choice')} it takes {numbers.percent(line.accuracy.value)} right "
            f"instead of {numbers.percent(before.accuracy.value)} "
            f"({numbers.points(line.accuracy_change.value)}, {numbers.evidence(line.accuracy_change, numbers.points)})."
        )
    if not found.reached:
        said.append("No depth keeps within the loss that was allowed; this is the cheapest.")
    return join(
        [
            paragraph(" ".join(said)),
            *(paragraph(note, class_="missing") for note in front.notes),
            paragraph(LIMITS),
        ]
    )


def _depths(front: Frontier, curve: Html) -> Html:
    rows: Rows = [
        [
            Cell(str(line.depth), value=line.depth),
            changed_layers(line),
            Cell(
                f"{line.perplexity.value:.2f}", numbers.interval(line.perplexity, numbers.number), line.perplexity.value
            ),
            _cell(line.added, numbers.signed),
            _cell(line.searched, numbers.signed),
            "" if line.predicted is None else Cell(numbers.signed(line.predicted), value=line.predicted),
            _cell(line.accuracy, numbers.percent),
            _speed(line),
        ]
        for line in front.lines
    ]
    head = [
        "Steps",
        "Side by side",
        "Perplexity",
        "Added (nats a token)",
        "On the search’s text",
        "Sum of single pairs",
        "Choices right",
        "Speed here",
    ]
    return section(
        "depths",
        "By depth",
        tag("div", figure("What each depth adds to the loss", curve), class_="charts"),
        table(
            "The best way found at each depth; 95 % intervals over windows, and over questions. Speed: tokens a second "
            "of greedy decoding over those of the model as it is, in brackets what layers timed alone foretell"
            + (f" ({front.machine})" if front.machine else ""),
            head,
            rows,
        ),
    )


def _cell(one: Estimate | None, form: numbers.Format) -> Cell | str:
    return "" if one is None else Cell(form(one.value), numbers.interval(one, form), one.value)


def _speed(line: Line) -> Cell | str:
    if line.speed is None:
        return ""
    foretold = f" ({line.foretold.median:.2f})" if line.foretold else ""
    found = line.speed
    return Cell(f"{found.median:.2f}{foretold}", f"{found.low:.2f} to {found.high:.2f}", found.median)


def changed_layers(line: Line) -> str:
    """What a depth does, in few words: its pairs by their layers."""
    together = [group for group in line.groups if len(group) > 1]
    if line.kind == SEQUENTIAL:
        return "none: the model as it is"
    if not line.groups:
        return f"{span(line.start, line.end)}, {WORDS[line.kind]}"
    return ", ".join("+".join(map(str, group)) for group in together)


def _plan(found: "Searched") -> Html:
    pairs = found.chosen.together
    words = ", ".join(" and ".join(map(str, group)) for group in pairs)
    return section(
        "plan",
        "The plan",
        paragraph(f"Layers that run side by side: {words}." if pairs else "No layers run side by side."),
        paragraph(
            "plan.json, beside this page, holds it. allmend depth apply makes a model folder of it, and allmend depth "
            "bench shows what it gains on your machine."
        ),
    )
