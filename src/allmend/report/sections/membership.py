"""Whether one can tell what was trained on: membership inference, and the bound on ε that follows from it."""

from allmend.report import numbers
from allmend.report.bounds import about, accounted, guaranteed, measured, quoted
from allmend.report.charts import Axis, Row, interval_plot
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, figure, in_figures, measure, paragraph, table
from allmend.report.sections.extraction import copies_of
from allmend.report.sections.utility import cell, look, titled
from allmend.results import AuditTable, EpsilonBound, Estimate, Membership

SCORES = {
    "loss": "loss",
    "ratio": "loss ratio to base",
    "min-k": "Min-K%",
    "min-k++": "Min-K%++",
    "zlib": "loss over zlib size",
}
GUESSING = 0.5


def _chart(evidence: Evidence, rows: list[Membership], copies: int) -> Html:
    groups = []
    for model in [m for m in evidence.models if any(r.model == m for r in rows)]:
        lines = []
        for row in (r for r in rows if r.model == model):
            ends = numbers.interval(row.auc, numbers.number)
            shown = numbers.number(row.auc.value) + (f" ({ends})" if ends else "")
            name = SCORES.get(row.score, row.score)
            tip = f"{titled(model)}, {name}\nAUC {numbers.number(row.auc.value)}, "
            tip += numbers.evidence(row.auc, numbers.number)
            lines.append(Row(model, name, look(evidence, model), row.auc.value, shown, tip, row.auc.low, row.auc.high))
        groups.append((titled(model), lines))
    return figure(
        f"Planted canaries told from controls, {copies_of(copies)}",
        interval_plot("Area under the ROC curve", groups, Axis("AUC", low=0.0, high=1.0, reference=GUESSING)),
        note="Area under the ROC curve of five scores, with 95 % intervals. 0.5 (the strong line) is guessing, 1 is "
        "certainty.",
    )


def _rate(estimate: Estimate | None, needed: int) -> str | Cell:
    if estimate is None:
        return Cell(numbers.NONE, f"needs {numbers.count(needed)} non-members")
    return cell(estimate, numbers.percent, numbers.hundredths)


def membership(evidence: Evidence, audit: AuditTable) -> Html:
    """Membership inference on canaries and on clients' records."""
    if not audit.membership:
        return Html("")
    canaries = [row for row in audit.membership if row.copies is not None]
    most = max((row.copies for row in canaries if row.copies is not None), default=0)
    charted = [row for row in canaries if row.copies == most]
    body: Rows = [
        [
            row.records,
            titled(row.model),
            Cell(numbers.NONE) if row.copies is None else Cell(numbers.count(row.copies), value=row.copies),
            SCORES.get(row.score, row.score),
            cell(row.auc, numbers.number, numbers.number),
            _rate(row.tpr_at_1, 100),
            _rate(row.tpr_at_01, 1000),
        ]
        for row in audit.membership
    ]
    head = ["Records", "Model", "Copies", "Score", "AUC", "Found at 1 % false positives", "Found at 0.1 %"]
    caption = "Membership inference (95 % interval; n members and non-members)"
    asked = [row for row in charted or audit.membership if row.model in evidence.audited]
    shown = next((row for row in asked if row.score == "ratio"), asked[0] if asked else audit.membership[0])
    about = copies_of(shown.copies) if shown.copies is not None else shown.records
    auc = f"AUC {numbers.number(shown.auc.value)} by {SCORES.get(shown.score, shown.score)}"
    headline = f"{titled(shown.model)}, {about}: {auc} (guessing: 0.5)"
    drawn = _chart(evidence, charted, most) if charted else Html("")
    return measure(
        "Whether one can tell what was trained on", headline, drawn, in_figures(table(caption, head, body), len(body))
    )


def above(bound: EpsilonBound) -> bool:
    """Whether the measured bound contradicts the accountant: possible to say of single copies alone, since the
    accountant's ε is for one record."""
    return bound.accounted is not None and bound.copies == 1 and bound.epsilon > bound.accounted


def _line(bound: EpsilonBound, guarantee: bool) -> list[str | Cell]:
    sign = "▲ above the accounted ε" if above(bound) else ""
    return [
        titled(bound.model),
        Cell(about(bound), value=bound.copies),
        Cell(measured(bound), sign, bound.epsilon),
        Cell(accounted(bound, guarantee=guarantee), value=bound.accounted),
        Cell(
            f"{numbers.count(bound.right)} of {numbers.count(bound.guesses)}",
            f"{numbers.count(bound.canaries)} coins",
            bound.right / max(1, bound.guesses),
        ),
        Cell(numbers.power(bound.delta), value=bound.delta),
        Cell(numbers.percent(bound.confidence, 0), value=bound.confidence),
        SCORES.get(bound.score, bound.score),
    ]


def measured_epsilon(evidence: Evidence, audit: AuditTable) -> Html:
    """The empirical lower bound on ε beside the accountant's upper bound."""
    if not audit.epsilon:
        return Html("")
    head = [
        "Model",
        "Copies",
        "Measured ε",
        "Accounted ε, one record",
        "Coins guessed right",
        "δ",
        "Confidence",
        "Score",
    ]
    words = (
        "Each canary was planted or kept out by the toss of a coin; whoever guesses many coins right from the model "
        "has refuted every small ε. A bound from canaries with several copies is on what those copies cost together; "
        "the accountant’s ε is for a single record. The measured ε is a lower bound: a stronger attack may find more."
    )
    tuned = [b for b in audit.epsilon if b.model in evidence.audited] or list(audit.epsilon)
    guarantees = {b.model: guaranteed(b.model, audit, evidence.privacy) for b in audit.epsilon}
    model = next((name for name in evidence.audited if any(b.model == name for b in tuned)), tuned[0].model)
    shown = quoted([b for b in tuned if b.model == model], beside_guarantee=guarantees[model])
    promised = accounted(shown, guarantee=guarantees[model])
    headline = f"{titled(model)}, {about(shown)}: {measured(shown)}"
    headline += f" (accounted: {promised})" if shown.accounted is not None else f" ({promised})"
    refuted = None
    if contradicting := [b for b in audit.epsilon if above(b)]:
        chance = numbers.percent(1 - min(b.confidence for b in contradicting), 0)
        refuted = paragraph(
            f"▲ A measured bound lies above the accounted ε of a single record. By chance this happens in up to "
            f"{chance} of audits; otherwise training or accounting is not what it should be.",
            class_="warning",
        )
    caption = "ε measured (lower bound, one run) and accounted (upper bound)"
    body = [_line(bound, guarantees[bound.model]) for bound in audit.epsilon]
    return measure("Measured ε", headline, refuted, paragraph(words), table(caption, head, body))
