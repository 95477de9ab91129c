"""The answers that a reader looks for first, as cards."""

from collections.abc import Sequence

from allmend.report.evidence import Evidence
from allmend.report.findings import Finding
from allmend.report.findings.cost import cost, left
from allmend.report.findings.memorisation import guaranteed, memorised, passed_on, recited
from allmend.report.findings.usefulness import against_alone, against_base, alone_against_base, by_member, paid
from allmend.report.markup import Html, join, tag
from allmend.report.numbers import THIN


def findings(evidence: Evidence) -> list[Finding]:
    """What a reader should know first; fewer when less was measured."""
    shared, personal = evidence.shared, evidence.personal
    found: list[Finding | None] = []
    for model in shared[:1]:
        found.append(against_base(evidence, model))
        found += [against_alone(evidence, model, alone) for alone in personal[:1]]
        found.append(by_member(evidence, model))
    if not shared:
        found += [alone_against_base(evidence, alone) for alone in personal[:1]]
    found.append(paid(evidence))
    for model in evidence.audited[:1]:
        found += [memorised(evidence, model), recited(evidence, model)]
    found += [passed_on(evidence), guaranteed(evidence)]
    for model in [*shared, *evidence.arms][:1]:
        found += [left(evidence, model), cost(evidence, model)]
    return [finding for finding in found if finding is not None]


def summary(evidence: Evidence) -> Html:
    """The findings as cards."""
    found = findings(evidence)
    if not found:
        return tag("p", "Nothing has been measured yet.")
    note = f"Intervals are 95{THIN}% intervals. Where one covers zero, the page says that no difference is shown."
    return join([cards(found), tag("p", note, class_="note")])


def cards(found: Sequence[Finding]) -> Html:
    """Findings side by side, a card each."""
    made = (
        tag(
            "li",
            tag("h3", finding.question),
            tag("b", finding.figure),
            tag("span", finding.about),
            tag("p", finding.sentence),
        )
        for finding in found
    )
    return tag("ul", *made, class_="findings")
