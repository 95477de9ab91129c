"""What the models memorised: likelihood of canaries against controls, and what a prefix brings out."""

import math

from allmend.report import numbers
from allmend.report.charts import Axis, Point, Series, line_chart
from allmend.report.evidence import Evidence
from allmend.report.marks import NEUTRAL, legend
from allmend.report.markup import Cell, Html, Rows, details, figure, paragraph, section, table, tag
from allmend.report.sections.utility import cell, look, titled
from allmend.results import AuditTable, Estimate, Extraction

CONTROLS = "controls"


def _copies(number: int) -> str:
    return numbers.counted(number, "copy", "copies")


def _gap_chart(evidence: Evidence, audit: AuditTable) -> Html:
    models = list(dict.fromkeys(gap.model for gap in audit.gaps))
    series = []
    for model in models:
        points = []
        for gap in sorted((g for g in audit.gaps if g.model == model), key=lambda g: g.copies):
            words = f"{numbers.signed(gap.gap.value)} nats per token, {numbers.evidence(gap.gap, numbers.number)}"
            tip = f"{titled(model)}, {_copies(gap.copies)}\n{words}"
            points.append(Point(gap.copies, gap.gap.value, tip, gap.gap.low, gap.gap.high))
        series.append(Series(model, titled(model), look(evidence, model), tuple(points)))
    copies = tuple(float(c) for c in sorted({gap.copies for gap in audit.gaps}))
    x = Axis("copies of the canary in the training data", ticks=copies, ordinal=True)
    y = Axis("log-likelihood over controls, nats per token", reference=0.0)
    return figure(
        "Likelihood gap",
        legend([(s.key, s.name, s.look) for s in series]),
        line_chart("Likelihood gap by number of copies", series, x, y, height=300),
        note="Above the strong zero line, planted canaries are likelier than canaries that the model never saw. "
        "Bars are 95 % intervals.",
    )


def _extraction_chart(audit: AuditTable, model: str, measure: str, of: str) -> Html:
    rows = [e for e in audit.extraction if e.model == model]
    copies = sorted({e.copies for e in rows})
    everything = sorted({e.copies for e in audit.extraction}, reverse=True)
    series: list[Series] = []
    controls = [e for e in rows if not e.inserted]
    for inserted in (False, True):
        for number in copies:
            points = []
            for e in sorted(
                (e for e in rows if (e.inserted, e.copies) == (inserted, number)), key=lambda e: e.prefix_tokens
            ):
                estimate: Estimate = getattr(e, measure)
                who = _copies(number) if inserted else f"controls of {_copies(number)}"
                words = f"{numbers.percent(estimate.value)}, {numbers.evidence(estimate, numbers.hundredths)}"
                tip = f"{who}, prefix of {e.prefix_tokens} tokens\n{of} {words}"
                points.append(
                    Point(e.prefix_tokens, estimate.value, tip, *((estimate.low, estimate.high) if inserted else ()))
                )
            last = controls and number == copies[-1]
            name = _copies(number) if inserted else CONTROLS if last else ""
            key = _copies(number) if inserted else CONTROLS
            if points:
                spot = everything.index(number) if inserted else NEUTRAL
                series.append(Series(key, name, spot, tuple(points), hollow=not inserted))
    prefixes = tuple(float(p) for p in sorted({e.prefix_tokens for e in audit.extraction}))
    y = Axis(f"{of}, %", form=lambda share: numbers.tick(100 * share), low=0.0, high=_ceiling(audit, measure))
    x = Axis("prefix, tokens", ticks=prefixes)
    return tag(
        "div", tag("h3", f"{titled(model)}: {of}"), line_chart(f"{of}, {titled(model)}", series, x, y, height=260)
    )


def _ceiling(audit: AuditTable, measure: str) -> float:
    """Common top of one measure's charts, at least 10 %."""
    estimates: list[Estimate] = [getattr(e, measure) for e in audit.extraction]
    return max([0.1, *(v for e in estimates for v in (e.value, e.high) if v is not None and math.isfinite(v))])


def _extraction(audit: AuditTable) -> Html:
    models = list(dict.fromkeys(e.model for e in audit.extraction))
    copies = sorted({e.copies for e in audit.extraction}, reverse=True)
    keys = [(_copies(c), _copies(c), i) for i, c in enumerate(copies)]
    charts = [
        _extraction_chart(audit, model, measure, of)
        for measure, of in (("exact", "exact match"), ("bleu", "BLEU"))
        for model in models
    ]
    return figure(
        "What a prefix brings out",
        legend([*keys, (CONTROLS, "controls (dashed, hollow)", NEUTRAL)], dashed=frozenset((CONTROLS,))),
        tag("div", *charts, class_="charts"),
        note="The model continues a canary from its first tokens, always taking the likeliest next one. Exact match: "
        "share of canaries continued without an error. BLEU: mean agreement of the continuation, 100 % is identical. "
        "The intervals of the controls stand in the table.",
    )


def _gap_table(audit: AuditTable) -> Html:
    body: Rows = [
        [
            titled(gap.model),
            Cell(numbers.count(gap.copies), value=gap.copies),
            *(cell(e, numbers.number, numbers.number) for e in (gap.gap, gap.inserted, gap.control)),
        ]
        for gap in audit.gaps
    ]
    head = ["Model", "Copies", "Gap", "Planted canaries", "Controls"]
    return table("Mean log-likelihood per token, nats (95 % interval; n canaries)", head, body)


def _extraction_table(audit: AuditTable) -> Html:
    def line(e: Extraction) -> list[str | Cell]:
        shares = (e.exact, e.matched, e.bleu, e.approximate)
        return [
            titled(e.model),
            Cell(numbers.count(e.copies), value=e.copies),
            "planted" if e.inserted else "control",
            Cell(numbers.count(e.prefix_tokens), value=e.prefix_tokens),
            *(cell(share, numbers.percent, numbers.hundredths) for share in shares),
        ]

    head = ["Model", "Copies", "Canaries", "Prefix, tokens", "Exact", "Matched", "BLEU", "BLEU over 0.75"]
    rows = [line(e) for e in audit.extraction]
    caption = "Continuations of canaries from a prefix (95 % interval; n canaries)"
    return details(f"Extraction in figures ({numbers.counted(len(rows), 'row')})", table(caption, head, rows))


def memorisation(evidence: Evidence) -> Html:
    """The section."""
    audit = evidence.audit
    title = "What the models memorised"
    if audit is None:
        return section("memorisation", title, paragraph("Not audited yet.", class_="missing"))
    planted = numbers.counted(audit.canaries, "synthetic record")
    controls = numbers.counted(audit.controls, "control")
    how = tag(
        "div",
        tag("h3", "How to read this"),
        paragraph(
            f"Before training, {planted} (canaries) were planted in the clients’ data; {controls} from the same "
            "generator were kept out by the toss of a seeded coin. A control is what a canary would be had it not been "
            "trained on: what a model does with controls is chance, and only the distance between the two is "
            "memorisation."
        ),
        paragraph(
            tag("strong", "Absence of extraction is not absence of memorisation."),
            " The likelihood gap shows an effect long before text comes out, and other prompts may bring out more.",
        ),
    )
    skipped = None
    if audit.skipped_prefixes:
        words = f"{numbers.counted(audit.skipped_prefixes, 'prefix', 'prefixes')} skipped: the canary was too short."
        skipped = paragraph(words, class_="note")
    return section(
        "memorisation",
        title,
        tag("div", _gap_chart(evidence, audit) if audit.gaps else None, how, class_="charts"),
        _gap_table(audit) if audit.gaps else None,
        _extraction(audit) if audit.extraction else None,
        skipped,
        _extraction_table(audit) if audit.extraction else None,
    )
