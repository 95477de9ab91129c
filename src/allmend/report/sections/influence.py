"""Whose data helped: each client's mean score with its interval, what travelled for it, and how to read it."""

from allmend.report import numbers
from allmend.report.charts import Axis, Row, interval_plot
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, details, figure, join, paragraph, section, table, tag
from allmend.results import ArmInfluence

NEAR = 0.1
"""Balance of a client's scores below which they cancel."""


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
        f"Target: {target}. Curvature over {numbers.counted(arm.records, 'training record')}, damping "
        f"{numbers.number(arm.damping)} of each block’s mean eigenvalue"
        + (f", factors that match {arm.modules}" if arm.modules else "")
        + ". First-order and at the final weights: no statement about the path of training."
    )
    parts: list[str | None] = [heading, paragraph(facts)]
    if not arm.members:
        parts.append(
            paragraph("Clients keep to themselves what their scores come to (influence.reveal).", class_="missing")
        )
    else:
        parts += [tag("div", _plot(arm), class_="charts"), paragraph(_verdict(arm)), _figures(arm)]
    if arm.silent:
        words = f"Too few records to tell ({arm.min_records} are the fewest): {', '.join(arm.silent)}."
        parts.append(paragraph(words))
    return join([*parts, _travelled(arm)])


def _plot(arm: ArmInfluence) -> Html:
    groups = []
    for target in arm.targets:
        lines = []
        for one in arm.told(target):
            words = numbers.evidence(one.mean, numbers.signed)
            tip = f"{one.client} for {target}\nmean score {numbers.signed(one.mean.value)}, {words}"
            shown = numbers.signed(one.mean.value)
            lines.append(Row(one.client, one.client, 0, one.mean.value, shown, tip, one.mean.low, one.mean.high))
        groups.append((target if len(arm.targets) > 1 else "", lines))
    return figure(
        "Mean score of a client’s records",
        interval_plot("Mean score of a client’s records", groups, Axis("mean score", form=numbers.tick, reference=0.0)),
        note="In units of the mean absolute score of all these records, with 95 % intervals over a client’s records. "
        "Intervals that overlap say nothing about an order.",
    )


def _verdict(arm: ArmInfluence) -> str:
    words = []
    for target in arm.targets:
        of = f"For {target}: " if len(arm.targets) > 1 else ""
        found = arm.told(target)
        helped = [one.client for one in found if one.mean.low is not None and one.mean.low > 0]
        hurt = [one.client for one in found if one.mean.high is not None and one.mean.high < 0]
        unclear = [one.client for one in found if one.client not in (*helped, *hurt)]
        said = [
            f"{verb}: {', '.join(names)}"
            for verb, names in (("helped", helped), ("hurt", hurt), ("unclear", unclear))
            if names
        ]
        line = of + "; ".join(said) + "."
        words.append(line[0].upper() + line[1:])
        if any(abs(one.balance) < NEAR for one in found):
            words.append(
                "Where a client’s scores nearly cancel (balance near 0), a negative mean says “less than the others”, "
                "not “harmful”."
            )
    return " ".join(words)


def _figures(arm: ArmInfluence) -> Html:
    many = len(arm.targets) > 1
    rows: Rows = [
        [
            one.client,
            *([one.target] if many else []),
            Cell(
                numbers.signed(one.mean.value),
                "; ".join(filter(None, (numbers.interval(one.mean, numbers.signed), numbers.sample(one.mean)))),
                one.mean.value,
            ),
            Cell(numbers.percent(one.below.value), numbers.interval(one.below, numbers.hundredths), one.below.value),
            Cell(numbers.signed(one.balance), value=one.balance),
        ]
        for target in arm.targets
        for one in arm.told(target)
    ]
    head = ["Client", *(["Target"] if many else []), "Mean score", "Records below 0", "Balance"]
    return table(
        "Scores by client, in units of the mean absolute score (95 % interval; n records). Balance: their sum over "
        "their absolute sum",
        head,
        rows,
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
