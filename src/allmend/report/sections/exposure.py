"""How far up the true value of a secret ranks among all that it could have been."""

import math

from allmend.report import numbers
from allmend.report.charts import Axis, Point, Series, line_chart
from allmend.report.evidence import Evidence
from allmend.report.marks import NEUTRAL, legend
from allmend.report.markup import Cell, Html, Rows, figure, in_figures, measure, table, tag
from allmend.report.sections.extraction import CONTROLS, PLANTED, copies_of
from allmend.report.sections.utility import cell, look, titled
from allmend.results import AuditTable, Exposure

NULL = 1 / math.log(2)
"""Mean exposure of a secret that the model knows nothing of: E[−log₂ U] for U uniform in (0, 1], in bits."""


def _chart(evidence: Evidence, slot: str, rows: list[Exposure]) -> Html:
    series = []
    for inserted in (False, True):
        for model in dict.fromkeys(e.model for e in rows):
            points = []
            for e in sorted((e for e in rows if (e.model, e.inserted) == (model, inserted)), key=lambda e: e.copies):
                who = f"{titled(model)}, {copies_of(e.copies)}, {PLANTED[inserted]}"
                words = f"{numbers.number(e.exposure.value)} bits, {numbers.evidence(e.exposure, numbers.number)}"
                ends = (e.exposure.low, e.exposure.high) if inserted else ()
                points.append(Point(e.copies, e.exposure.value, f"{who}\n{words}", *ends))
            if points:
                key = model if inserted else CONTROLS
                name = titled(model) if inserted else ""
                series.append(Series(key, name, look(evidence, model), tuple(points), hollow=not inserted))
    copies = tuple(float(c) for c in sorted({e.copies for e in rows}))
    values, compared = rows[0].values, min(e.compared for e in rows)
    limit = math.log2(compared)
    x = Axis("copies of the canary in the training data", ticks=copies, ordinal=True)
    y = Axis("exposure, bits", low=0.0, reference=NULL, limit=limit)
    title = f"{slot}: {numbers.count(values)} values, {numbers.number(math.log2(values))} bits"
    if compared < values:
        title += f"; ranked against {numbers.count(compared)}, at most {numbers.number(limit)} bits"
    return tag("div", tag("h3", title), line_chart(f"Exposure of {slot}", series, x, y, height=260))


def exposure(evidence: Evidence, audit: AuditTable) -> Html:
    """Exposure by secret and number of copies, between the null and the ceiling."""
    if not audit.exposure:
        return Html("")
    slots: dict[tuple[str, int], list[Exposure]] = {}
    for row in audit.exposure:
        slots.setdefault((row.slot, row.values), []).append(row)
    models = [m for m in evidence.models if any(e.model == m for e in audit.exposure)]
    keys = [(m, titled(m), look(evidence, m)) for m in models]
    drawn = figure(
        "Exposure",
        legend([*keys, (CONTROLS, "controls (dashed, hollow)", NEUTRAL)], dashed=frozenset((CONTROLS,))),
        tag("div", *(_chart(evidence, slot, rows) for (slot, _), rows in slots.items()), class_="charts"),
        note="Bits by which the model puts the true value ahead of the others. The strong line is 1.44 bits, the mean "
        "where nothing is known of the secret; the dashed one is the ceiling, where the true value is the likeliest of "
        "all it was ranked against (log₂ |R| where these were all values).",
    )
    body: Rows = [
        [
            e.slot,
            titled(e.model),
            Cell(numbers.count(e.copies), value=e.copies),
            PLANTED[e.inserted],
            cell(e.exposure, numbers.number, numbers.number),
            _fitted(e),
            Cell(numbers.number(math.log2(e.values)), f"{numbers.count(e.values)} values", e.values),
            Cell(numbers.count(e.compared), value=e.compared),
        ]
        for rows in slots.values()
        for e in rows
    ]
    head = ["Secret", "Model", "Copies", "Canaries", "Exposure", "Fitted", "Ceiling", "Ranked against"]
    whole = table("Exposure of secrets, bits (95 % interval; n canaries)", head, body)
    tuned = [e for e in audit.exposure if e.inserted and e.model in evidence.audited]
    most = max(tuned, key=lambda e: e.exposure.value, default=None)
    headline = "of the base model alone"
    if most is not None:
        bits = f"{numbers.number(most.exposure.value)} of at most {numbers.number(math.log2(most.compared))} bits"
        headline = f"highest: {most.slot}, {titled(most.model)}, {copies_of(most.copies)}, {bits} (guessing: 1.44)"
    return measure("How exposed each secret is", headline, drawn, in_figures(whole, len(body)))


def _fitted(e: Exposure) -> Cell | str:
    if e.fitted is None:
        return Cell(numbers.NONE, "all values ranked" if e.compared == e.values else "")
    shown = cell(e.fitted, numbers.number, numbers.number)
    if not e.poor_fits or isinstance(shown, str):
        return shown
    return Cell(shown.shown, f"{shown.under}; {numbers.counted(e.poor_fits, 'poor fit')}", shown.value)
