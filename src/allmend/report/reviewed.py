"""The page of `allmend attribute mislabeled`: records to look at and, where labels say what is wrong, what each measure
of suspicion finds.

It shows the beginning of records: it is for whoever may read them, and stays with them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend.report import numbers
from allmend.report.charts import NEUTRAL, Axis, Point, Row, Series, interval_plot, line_chart
from allmend.report.influence_figures import beginning
from allmend.report.marks import legend
from allmend.report.markup import Cell, Html, Rows, figure, listed, paragraph, section, table, tag, terms
from allmend.report.page import fill, head_of
from allmend.results import Estimate
from allmend.run import write_atomic

LETTERS = 300
"""Of a record's text."""
MOST = 50
"""Records from the head of each measure's list."""
MOST_POINTS = 300
"""Of a line."""
CHANCE = "chance"


@dataclass(frozen=True)
class Suspicious:
    """A training record.

    Attributes:
        id, client: which.
        measures: by name, the higher the more suspicious.
        text: of the record.
        wrong: whether its label says so; None without labels.
    """

    id: str
    client: str
    measures: Mapping[str, float]
    text: str
    wrong: bool | None = None


@dataclass(frozen=True)
class Found:
    """How well a measure finds wrong records.

    Attributes:
        auc: area under the ROC curve.
        recall: share of the wrong records in the first part of the list, by that part's share of it.
    """

    auc: Estimate
    recall: Mapping[float, Estimate]


def write_reviewed(
    path: Path,
    records: Sequence[Suspicious],
    found: Mapping[str, Found],
    *,
    verdict: str,
    facts: Sequence[tuple[str, str]],
    settings: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
) -> Path:
    """Write the page, readable by its owner alone, and return its path.

    Args:
        path: where to.
        records: in the order in which to look at them; all have the same measures.
        found: by measure; empty without labels.
        verdict: whether the first measure finds more than the others, in words.
        facts: terms and what they are here, for the head of the page.
        settings: the same, of how it was measured.
        notes: what else a reader should know.

    Raises:
        UserError: the operating system refused.
    """
    parts = [("records", "Records to look at", _records(records))]
    if found:
        parts.insert(0, ("found", "What each measure finds", _found(records, found)))
    page = fill(
        title="records to review · allmend",
        head=head_of("Allmend, records to review", "Which records may be wrong", facts),
        contents=[*((anchor, title) for anchor, title, _ in parts), ("measured", "How it was measured")],
        summary=tag("div", paragraph(tag("strong", verdict)), paragraph(_HOW)),
        sections=[
            *(part for *_, part in parts),
            section("measured", "How it was measured", terms(settings), listed(notes)),
        ],
    )
    write_atomic(path, page.encode(), mode=0o600)
    return path


_HOW = (
    "Influence is above 0 where training on the record raises the target’s loss; self-influence is that of a record on "
    "its own loss. A suspicious record need not be wrong: a rare but right one may look the same. Read before anything "
    "is left out."
)


def detection_curve(measure: Sequence[float], wrong: Sequence[bool]) -> tuple[tuple[float, float], ...]:
    """Share of the wrong records found by share of all records reviewed, the most suspicious first; from (0, 0) on.

    Records of the same measure come in any order, so that the line between the ends of a tie is straight. The area
    under it is π / 2 + (1 − π) AUC for π the share of wrong records.

    Args:
        measure: of each record, higher for more suspicious.
        wrong: whether it is; one is.
    """
    order = sorted(range(len(measure)), key=lambda place: -measure[place])
    curve, found = [(0.0, 0.0)], 0
    for reviewed, place in enumerate(order, start=1):
        found += wrong[place]
        if reviewed == len(order) or measure[place] != measure[order[reviewed]]:
            curve.append((reviewed / len(order), found / sum(wrong)))
    return tuple(curve)


def _thinned(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = -(-len(curve) // MOST_POINTS)
    return [*curve[:-1:every], curve[-1]]


def _found(records: Sequence[Suspicious], found: Mapping[str, Found]) -> Html:
    wrong = [bool(record.wrong) for record in records]
    series = [Series(CHANCE, "", NEUTRAL, trace=((0.0, 0.0), (100.0, 100.0)), hollow=True, said=_SAID)]
    rows = []
    for look, (name, one) in enumerate(found.items()):
        curve = _thinned(detection_curve([record.measures[name] for record in records], wrong))
        trace = tuple((100 * x, 100 * y) for x, y in curve)
        points = tuple(_marker(name, depth, recall, len(records)) for depth, recall in one.recall.items())
        series.append(Series(name, "", look, points, trace=trace, said=_SAID))
        auc = numbers.number(one.auc.value)
        tip = f"{name}\nAUC {auc}, {numbers.evidence(one.auc, numbers.number)}"
        rows.append(Row(name, name, look, one.auc.value, auc, tip, one.auc.low, one.auc.high))
    keys = [(name, name, look) for look, name in enumerate(found)] + [(CHANCE, CHANCE, NEUTRAL)]
    x, y = (Axis(name, form=_per_cent, ticks=_FIFTHS) for name in ("records reviewed", "wrong records found"))
    depths = ", ".join(numbers.percent(depth, 0) for depth in _depths(found))
    curves = figure(
        "Wrong records found by records reviewed",
        legend(keys, dashed=frozenset((CHANCE,))),
        line_chart("Wrong records found by records reviewed", series, x, y, height=320),
        note=f"The most suspicious first; {numbers.out_of(sum(wrong), len(wrong))} are wrong. Markers: {depths} of the "
        "list.",
    )
    plot = figure(
        "Area under the ROC curve",
        interval_plot("Area under the ROC curve", [("", rows)], Axis("AUC", low=0.0, high=1.0, reference=0.5)),
        note="The probability that a wrong record stands above a right one, with 95 % intervals. 0.5 (the strong line) "
        "is chance.",
    )
    return section("found", "What each measure finds", tag("div", curves, plot, class_="charts"), _table(found))


def _marker(name: str, depth: float, recall: Estimate, records: int) -> Point:
    tip = f"{name}, {numbers.percent(depth, 0)} of records reviewed\n{numbers.percent(recall.value)} of the wrong ones "
    tip += f"found, {numbers.evidence(recall, numbers.hundredths)}"
    return Point(100 * round(depth * records) / records, 100 * recall.value, tip)


def _depths(found: Mapping[str, Found]) -> list[float]:
    return list(next(iter(found.values())).recall)


_FIFTHS = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)
_SAID = "{x} % of records reviewed\n{y} % of the wrong ones found"


def _per_cent(value: float) -> str:
    return numbers.percent(value / 100, 0)


def _table(found: Mapping[str, Found]) -> Html:
    rows: Rows = [
        [
            name,
            Cell(numbers.number(one.auc.value), numbers.interval(one.auc, numbers.number), one.auc.value),
            *(
                Cell(numbers.percent(recall.value), numbers.interval(recall, numbers.hundredths), recall.value)
                for recall in one.recall.values()
            ),
        ]
        for name, one in found.items()
    ]
    depths = [f"Found in {numbers.percent(depth, 0)}" for depth in _depths(found)]
    return table("What each measure finds (95 % intervals)", ["Measure", "AUC", *depths], rows)


def _records(records: Sequence[Suspicious]) -> Html:
    names = list(records[0].measures)
    ranks = {name: _ranks([record.measures[name] for record in records]) for name in names}
    shown = [place for place in range(len(records)) if min(ranks[name][place] for name in names) <= MOST]
    labelled = any(record.wrong is not None for record in records)
    rows: Rows = []
    for place in shown:
        record = records[place]
        measured = [
            Cell(
                numbers.number(record.measures[name]),
                f"rank {numbers.count(ranks[name][place])}",
                record.measures[name],
            )
            for name in names
        ]
        label = ["" if record.wrong is None else "wrong" if record.wrong else "right"] if labelled else []
        rows.append([beginning(record.text, LETTERS), record.id, record.client, *measured, *label])
    head = [
        "Record",
        "Id",
        "Client",
        *(f"{name[0].upper()}{name[1:]}" for name in names),
        *(["Label"] if labelled else []),
    ]
    part = (
        f"The first {MOST} by each measure, {numbers.out_of(len(shown), len(records))} records"
        if len(shown) < len(records)
        else f"All {numbers.count(len(records))} records"
    )
    words = f"{part}, in the order of {names[0]}. A heading sorts by its column."
    return section(
        "records", "Records to look at", paragraph(words), table("Records, the most suspicious first", head, rows)
    )


def _ranks(values: Sequence[float]) -> list[int]:
    """1 for the highest."""
    ranks = [0] * len(values)
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: -values[place]), start=1):
        ranks[place] = rank
    return ranks
