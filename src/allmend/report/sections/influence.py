"""Whose data helped: each client's mean score with its interval, what travelled for it, and how to read it."""

from allmend.report import numbers
from allmend.report.evidence import Evidence
from allmend.report.influence_figures import client_map, client_means, client_table, helped_and_hurt
from allmend.report.markup import Cell, Html, Rows, details, join, paragraph, section, table, tag
from allmend.results import ArmInfluence


def influence(evidence: Evidence) -> Html:
    """The section; nothing where influence was not measured."""
    if evidence.influence is None or not evidence.influence.arms:
        return Html("")
    intro = (
        "Which clients’ records moved the model towards what it is meant for? A score above 0 says that training on a "
        "record lowers the target’s loss; the mean of a client’s scores says whose data helped. Each client scored its "
        "own records, and only sums left it."
    )
    return section(
        "influence",
        "Whose data helped",
        paragraph(intro),
        *(_arm(arm, many=len(evidence.influence.arms) > 1) for arm in evidence.influence.arms),
    )


def _arm(arm: ArmInfluence, *, many: bool) -> Html:
    heading = tag("h3", arm.arm) if many else None
    target = (
        f"all clients’ held-out records ({numbers.count(arm.target_records)})"
        if arm.target == "held_out"
        else f"{arm.target} ({numbers.counted(arm.target_records, 'record')} of the coordinator’s)"
    )
    facts = (
        f"Target: {target}. {_curvature(arm)}"
        + (f", factors that match {arm.modules}" if arm.modules else "")
        + ". First-order and at the final weights: no statement about the path of training."
    )
    parts: list[str | None] = [heading, paragraph(facts)]
    if arm.clip is not None:
        words = (
            f"{numbers.count(arm.clipped)} of {numbers.counted(arm.gradients, 'gradient')}, a record’s of a factor "
            f"each, were scaled down to norm {numbers.number(arm.clip)} for the curvature."
        )
        parts.append(paragraph(words))
    if not arm.members:
        parts.append(
            paragraph("Clients keep to themselves what their scores come to (influence.reveal).", class_="missing")
        )
    else:
        told = {target: arm.told(target) for target in arm.targets}
        charts = [client_means(told, {}, title="Mean score of a client’s records")]
        if len(told) > 1:
            charts.append(client_map(told, sorted({one.client for one in arm.members})))
        parts += [tag("div", *charts, class_="charts"), paragraph(helped_and_hurt(told)), client_table(told)]
    if arm.silent:
        words = f"Too few records to tell ({arm.min_records} are the fewest): {', '.join(arm.silent)}."
        parts.append(paragraph(words))
    return join([*parts, _travelled(arm)])


def _curvature(arm: ArmInfluence) -> str:
    if arm.method == "hessian_free":
        return "No curvature (hessian_free): scores are products with the target’s gradients"
    if arm.method == "datainf":
        whose, of = "Curvature by DataInf", "the mean square of a factor’s gradients"
    else:
        whose, of = "Curvature", "each block’s mean eigenvalue"
    return (
        f"{whose} over {numbers.counted(arm.records, 'training record')}, damping {numbers.number(arm.damping)} of {of}"
    )


def _travelled(arm: ArmInfluence) -> Html:
    rows: Rows = [
        [
            leg.name,
            ", ".join(leg.members),
            Cell(numbers.size(leg.sent), value=leg.sent),
            Cell(numbers.size(leg.received), value=leg.received),
        ]
        for leg in arm.legs
    ]
    hidden = (
        "Sums were formed behind masks"
        + (
            f"; rounding for that moves the directions by {numbers.power(arm.error)} of their length."
            if arm.error is not None
            else "."
        )
        if arm.hidden
        else "Sums were formed in sight of whoever adds up, as in a simulation."
    )
    return details(
        "What travelled",
        paragraph(hidden),
        table("Legs, and bytes of the member with the most", ["Leg", "Members", "To a member", "From it"], rows),
        paragraph(f"{numbers.counted(len(arm.skipped), 'factor')} without a gradient left out.")
        if arm.skipped
        else Html(""),
    )
