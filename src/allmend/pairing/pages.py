"""Pages and pictures of a scan and of a search."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allmend import __version__
from allmend.report import numbers
from allmend.report.depth_figures import ADDED, LIMITS, depths, loss_by_depth, named_layers, plan_in_words, span, told
from allmend.report.heat_map import HeatCell, heat_map
from allmend.report.markup import Cell, Html, Rows, figure, join, paragraph, section, table, tag
from allmend.report.page import fill, head_of
from allmend.report.picture import picture
from allmend.results import KINDS_IN_WORDS, DepthSearch
from allmend.run import write_atomic

if TYPE_CHECKING:
    from allmend.pairing.folders import Scanned

PAGE = "depth.html"

DARKEST = 0.5
"""Nats a token beyond which cells look alike: the model is broken there."""

BEST = 10
"""Stretches of a kind that the page lists."""


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


def _title(kind: str) -> str:
    words = KINDS_IN_WORDS[kind]
    return words[0].upper() + words[1:]


def _map(kind: str, found: "Scanned") -> Html:
    cells = {}
    for cell in found.cells:
        if cell.kind == kind:
            tip = (
                f"{named_layers(cell.start, cell.end)}, {KINDS_IN_WORDS[kind]}\n"
                f"{numbers.signed(cell.added)} nats a token "
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


def write_search_pages(out: Path, found: DepthSearch) -> Path:
    """Write `loss_by_depth.svg` and `depth.html`, and return the page's path.

    Raises:
        UserError: the operating system refused.
    """
    front = found.frontier
    curve = loss_by_depth(front)
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
        sections=[section("depths", "By depth", depths(front, curve)), _plan(found)],
    )
    write_atomic(out / PAGE, page.encode())
    return out / PAGE


def _search_summary(found: DepthSearch) -> Html:
    notes = [paragraph(note, class_="missing") for note in found.frontier.notes]
    return join([paragraph(told(found)), *notes, paragraph(LIMITS)])


def _plan(found: DepthSearch) -> Html:
    return section(
        "plan",
        "The plan",
        paragraph(plan_in_words(found)),
        paragraph(
            "plan.json, beside this page, holds it. allmend depth apply makes a model folder of it, and allmend depth "
            "bench shows what it gains on your machine."
        ),
    )
