"""What the models memorised: whether anything came out, whose it was, and every measure behind that to unfold."""

from allmend.report import numbers
from allmend.report.charts import Axis, Point, Series, line_chart
from allmend.report.evidence import Evidence
from allmend.report.marks import legend
from allmend.report.markup import Cell, Html, Rows, details, figure, join, measure, paragraph, section, table, tag
from allmend.report.sections.answer import came_out, whose
from allmend.report.sections.exposure import exposure
from allmend.report.sections.extraction import copies_of, discoverable, extraction
from allmend.report.sections.members_models import members_models
from allmend.report.sections.membership import measured_epsilon, membership
from allmend.report.sections.utility import cell, look, titled
from allmend.report.sections.views import views
from allmend.results import AuditTable

MOST_REASONS = 5
"""Reasons of refused figures that are listed openly."""
LIMITS = (
    (
        "Absence of extraction is not absence of memorisation.",
        "Other prompts, or access to the weights, may bring out more.",
    ),
    (
        "Canaries measure their own kind of secret.",
        "Real records may be easier or harder to remember than what the generator writes.",
    ),
    ("Controls remove guessing from the template,", "not what the model learns about one canary from another."),
    ("A small model memorises less than a large one.", "Figures do not carry over to another size."),
    (
        "A guarantee of differential privacy protects its unit alone:",
        "one record, or one member with all records. What stands in many records or at many members is not covered.",
    ),
)


def _gap_chart(evidence: Evidence, audit: AuditTable) -> Html:
    series = []
    for model in dict.fromkeys(gap.model for gap in audit.gaps):
        points = []
        for gap in sorted((g for g in audit.gaps if g.model == model), key=lambda g: g.copies):
            words = f"{numbers.signed(gap.gap.value)} nats per token, {numbers.evidence(gap.gap, numbers.number)}"
            tip = f"{titled(model)}, {copies_of(gap.copies)}\n{words}"
            points.append(Point(gap.copies, gap.gap.value, tip, gap.gap.low, gap.gap.high))
        series.append(Series(model, titled(model), look(evidence, model), tuple(points)))
    copies = tuple(float(c) for c in sorted({gap.copies for gap in audit.gaps}))
    x = Axis("copies of the canary in the training data", ticks=copies, ordinal=True)
    y = Axis("log-likelihood over controls, nats per token", reference=0.0)
    return figure(
        "Likelihood gap",
        legend([(s.key, s.name, s.look) for s in series]),
        line_chart("Likelihood gap by number of copies", series, x, y, height=300),
        note="The most sensitive measure: above the strong zero line, planted canaries are likelier than canaries that "
        "the model never saw. Bars are 95 % intervals.",
    )


def _gap_table(evidence: Evidence, audit: AuditTable) -> Html:
    if not audit.gaps:
        return Html("")
    body: Rows = [
        [
            titled(gap.model),
            Cell(numbers.count(gap.copies), value=gap.copies),
            *(cell(e, numbers.number, numbers.number) for e in (gap.gap, gap.inserted, gap.control)),
        ]
        for gap in audit.gaps
    ]
    head = ["Model", "Copies", "Gap", "Planted canaries", "Controls"]
    caption = "Mean log-likelihood per token, nats (95 % interval; n canaries)"
    tuned = [gap for gap in audit.gaps if gap.model in evidence.audited] or list(audit.gaps)
    most = max((gap for gap in tuned if gap.model == tuned[0].model), key=lambda gap: gap.copies)
    gap = f"{numbers.signed(most.gap.value)} nats per token"
    headline = f"{titled(most.model)}, {copies_of(most.copies)}: {gap}"
    return measure("Likelihood gap in figures", headline, table(caption, head, body))


def _learnt(audit: AuditTable) -> Html:
    if not audit.learnt:
        return Html("")
    body: Rows = [
        [
            row.model,
            Cell(numbers.count(row.copies), value=row.copies),
            Cell(numbers.count(row.canaries), value=row.canaries),
            Cell(numbers.count(row.tokens), value=row.tokens),
            Cell(numbers.number(row.steps), value=row.steps),
            Cell(numbers.count(row.least_tokens), "" if row.least_tokens else "▲ not learnt from", row.least_tokens),
        ]
        for row in audit.learnt
    ]
    head = ["Model", "Copies", "Canaries", "Tokens under the loss", "Optimiser steps", "Tokens, least canary"]
    caption = "How much training looked at each planted canary (means; all steps and copies counted)"
    least = numbers.counted(min(row.least_tokens for row in audit.learnt), "token")
    headline = f"the canary learnt from least: {least} under the loss"
    return measure("What training looked at", headline, table(caption, head, body))


def _identifiers(audit: AuditTable) -> Html:
    if not audit.identifiers:
        return Html("")
    kinds = list(dict.fromkeys(kind for counts in audit.identifiers.values() for kind in counts))
    body: Rows = [
        [titled(model), *(Cell(numbers.count(counts.get(kind, 0)), value=counts.get(kind, 0)) for kind in kinds)]
        for model, counts in audit.identifiers.items()
    ]
    sums = {titled(model): sum(counts.values()) for model, counts in audit.identifiers.items()}
    headline = ", ".join(f"{model} {numbers.count(n)}" for model, n in sums.items())
    words = (
        "Found by their form in the models’ continuations of canaries, true or made up. They are counted, not shown. A "
        "count above that of the base model says that tuning taught the form; whether the content is right is what "
        "the other measures tell."
    )
    whole = table("What looks like personal data, by kind", ["Model", *kinds], body)
    return measure("What looks like personal data", headline, paragraph(words), whole)


def _statements(audit: AuditTable) -> Html:
    """What a reader must know before any figure: whether the design moved, and whether canaries were learnt from."""
    told: list[Html] = []
    if audit.design_changed:
        told.append(
            paragraph(
                "▲ The design of the audit is not the one that was fixed before training. Prefixes, draws or secrets "
                "were chosen when the outcome could be known: read the figures as exploration.",
                class_="warning",
            )
        )
    idle = [row for row in audit.learnt if row.least_tokens == 0]
    if idle:
        cells = ", ".join(f"{row.model} with {copies_of(row.copies)}" for row in idle)
        told.append(
            paragraph(
                f"▲ Some planted canaries carried no loss ({cells}). That they do not come out says nothing.",
                class_="warning",
            )
        )
    return join(told)


def _assurances(audit: AuditTable) -> str:
    words = []
    if audit.design_changed is False:
        words.append("The design of this audit was fixed before training and is unchanged.")
    elif audit.design_changed is None:
        words.append("Whether the design of this audit was fixed before training is not known.")
    if audit.learnt and all(row.least_tokens for row in audit.learnt):
        words.append("Every planted canary was learnt from.")
    elif not audit.learnt:
        words.append("Whether every planted canary was learnt from is not recorded.")
    if audit.skipped_prefixes:
        skipped = numbers.counted(audit.skipped_prefixes, "prefix", "prefixes")
        words.append(f"{skipped} skipped: the canary was too short.")
    return " ".join(words)


def _absent(parts: list[tuple[str, Html]], refused: tuple[str, ...]) -> Html | None:
    """Measures without a figure, and the reasons that the audit gives."""
    lacking = [name for name, part in parts if not part]
    if not lacking and not refused:
        return None
    words = f"Not part of this audit: {', '.join(lacking)}." if lacking else None
    reasons = tag("ul", *(tag("li", reason) for reason in refused))
    told = "Figures that the audit refused to give"
    if len(refused) > MOST_REASONS:
        listed: Html | None = details(f"{told} ({len(refused)})", reasons)
    else:
        listed = join([paragraph(f"{told}:"), reasons]) if refused else None
    heading = tag("h3", "What is not here")
    return tag("div", heading, paragraph(words) if words else None, listed, class_="absent")


def memorisation(evidence: Evidence) -> Html:
    """The section."""
    audit = evidence.audit
    title = "What the models memorised"
    if audit is None:
        if "[canaries]" not in (evidence.recipe or "[canaries]"):
            return section(
                "memorisation", title, paragraph("The recipe plants no canaries: there is nothing to audit.")
            )
        return section("memorisation", title, paragraph("Not audited yet.", class_="missing"))
    planted = numbers.counted(audit.canaries, "synthetic record")
    controls = numbers.counted(audit.controls, "control")
    intro = paragraph(
        f"Before training, {planted} (canaries) were planted in the clients’ data; {controls} from the same "
        "generator were kept out by the toss of a seeded coin. What a model does with controls is chance, and only the "
        "distance between the two is memorisation."
    )
    limits = tag(
        "div",
        tag("h3", "What this cannot show"),
        tag("ul", *(tag("li", tag("strong", head), " ", rest) for head, rest in LIMITS), class_="limits"),
    )
    members = whose(evidence, audit)
    parts = [
        ("extraction by member", join(members)),
        ("likelihood gaps", _gap_table(evidence, audit)),
        ("extraction", extraction(evidence, audit)),
        ("(n, p)-discoverable extraction", discoverable(evidence, audit)),
        ("exposure", exposure(evidence, audit)),
        ("membership inference", membership(evidence, audit)),
        ("a measured bound on ε", measured_epsilon(evidence, audit)),
        ("what each party sees by round", views(evidence, audit)),
        ("what training looked at", _learnt(audit)),
        ("counts of what looks like personal data", _identifiers(audit)),
    ]
    return section(
        "memorisation",
        title,
        intro,
        _statements(audit),
        *came_out(evidence, audit),
        *members,
        *members_models(evidence),
        tag("div", _gap_chart(evidence, audit) if audit.gaps else None, limits, class_="charts"),
        *(part for _, part in parts[1:]),
        _absent(parts, audit.refused),
        paragraph(_assurances(audit), class_="note"),
    )
