"""Who answers: how much weight members' routers give to the experts that all share, layer by layer."""

from collections.abc import Iterable, Sequence

from allmend.report import numbers
from allmend.report.evidence import Evidence
from allmend.report.heat_map import HeatCell, heat_map
from allmend.report.markup import Cell, Html, Rows, figure, in_figures, paragraph, section, table, tag
from allmend.results import ArmRouting, Estimate, MemberRouting

EVEN = 0.5
"""Weight of the generalists at which neither side answers more."""

NEAR = 0.1
"""Reach of a scale to either side of it at least: differences that hardly matter shall not look large."""

MOST = 60
"""Members that the map has room for."""


def weight(value: float) -> str:
    """A weight in [0, 1]; what is below half a hundredth is as good as none."""
    return f"{value:.2f}"


def ends_of_scale(values: Iterable[float]) -> tuple[float, float]:
    """Ends of a scale of the generalists' weights, as far from an even weight on either side."""
    reach = max((abs(value - EVEN) for value in values), default=NEAR)
    return EVEN - max(reach, NEAR), EVEN + max(reach, NEAR)


def routing(evidence: Evidence) -> Html:
    """The section; nothing where no arm has mixtures."""
    arms = [arm for arm in (evidence.routing.arms if evidence.routing else ()) if arm.members]
    if not arms:
        return Html("")
    intro = (
        "In each layer a router weighs the experts for each token. How much of the weight goes to the generalists, "
        "which all clients share? The rest goes to the client’s own specialists. It is a statement about these "
        "records, and a large weight does not say that an expert helps."
    )
    return section(
        "routing",
        "Who answers: routers",
        paragraph(intro),
        *(part for arm in arms for part in (tag("h3", arm.arm) if len(arms) > 1 else None, *of_arm(arm))),
    )


def of_arm(arm: ArmRouting) -> list[Html]:
    """What is shown of an arm that has a member: warnings, the map and its figures."""
    if not any(member.shared for member in arm.members):
        alone = "There is no generalist: all the weight is with specialists."
        return [paragraph(alone), *(paragraph(warning, class_="warning") for warning in arm.warnings)]
    return [
        paragraph(read_in_words(arm.members)),
        *(paragraph(warning, class_="warning") for warning in arm.warnings),
        tag("div", figure("Weight of the generalists", routing_map(arm)), class_="charts"),
        table(
            "Weight of the generalists on each client’s records",
            ["Client", "All layers", "Lowest", "Highest", "Generalists", "Specialists", "Tokens"],
            rows_of(arm),
        ),
        in_figures(by_layer(arm), len(arm.layers)),
    ]


def read_in_words(members: Sequence[MemberRouting]) -> str:
    """What was read, in a sentence."""
    tokens = sum(member.overall.n for member in members)
    records = sum(member.records for member in members)
    on = sum(member.target for member in members)
    which = "records of the targets, which routers learnt from" if on == len(members) else "held-out records"
    if 0 < on < len(members):
        which += f" and, for {numbers.counted(on, 'client')} without any, of the target"
    return (
        f"Means over {numbers.count(tokens)} tokens of {numbers.count(records)} {which}: every token that the "
        "model reads, prompts and templates among them."
    )


def routing_map(arm: ArmRouting) -> Html:
    """Weight of the generalists, clients from the top down, layers from left to right."""
    members = arm.members[:MOST]
    cells = {
        (i, j): HeatCell(
            mass.value,
            f"{member.member}, layer {arm.layers[j]}\ngeneralists {weight(mass.value)} "
            f"({numbers.evidence(mass, weight)})",
        )
        for i, member in enumerate(members)
        for j, mass in enumerate(member.mass)
    }
    low, high = ends_of_scale(cell.value for cell in cells.values())
    return heat_map(
        "Weight of the generalists by client and layer",
        [member.member for member in members],
        [str(layer) for layer in arm.layers],
        cells,
        low=low,
        high=high,
        middle=EVEN,
        form=weight,
        quantity="weight of the generalists, in [0, 1]",
        column_name="layer",
    )


def expert_map(member: MemberRouting, layers: Sequence[int]) -> Html:
    """Mean gates of one member's experts, layers from left to right."""
    names = experts_of(member)
    cells = {
        (i, j): HeatCell(gates[i], f"{name}, layer {layers[j]}\nweight {weight(gates[i])}")
        for i, name in enumerate(names)
        for j, gates in enumerate(member.gates)
    }
    return heat_map(
        "Weight of each expert by layer",
        names,
        [str(layer) for layer in layers],
        cells,
        low=0.0,
        high=1.0,
        form=weight,
        quantity="mean weight of an expert, in [0, 1]",
        column_name="layer",
    )


def experts_of(member: MemberRouting) -> list[str]:
    """Names of a member's experts, in the order of its gates."""
    of = (("generalist", member.shared), ("specialist", member.own))
    return [sort if count == 1 else f"{sort} {place + 1}" for sort, count in of for place in range(count)]


def ends_of(member: MemberRouting) -> tuple[int, int]:
    """Places of the layers in which the generalists have least and most."""
    order = sorted(range(len(member.mass)), key=lambda place: member.mass[place].value)
    return order[0], order[-1]


def rows_of(arm: ArmRouting) -> Rows:
    """A row for each client."""
    rows: Rows = []
    for member in arm.members:
        ends = ends_of(member)
        rows.append(
            [
                member.member,
                _cell(member.overall),
                *(
                    Cell(
                        weight(member.mass[place].value),
                        under=f"layer {arm.layers[place]}",
                        value=member.mass[place].value,
                    )
                    if member.routed
                    else Cell(numbers.NONE)
                    for place in ends
                ),
                Cell(str(member.shared), value=member.shared),
                Cell(str(member.own), value=member.own),
                Cell(numbers.count(member.overall.n), value=member.overall.n),
            ]
        )
    return rows


def by_layer(arm: ArmRouting) -> Html:
    """Every figure of the map."""
    return table(
        "Weight of the generalists by layer",
        ["Layer", *(member.member for member in arm.members)],
        [
            [f"layer {layer}", *(_cell(member.mass[place]) for member in arm.members)]
            for place, layer in enumerate(arm.layers)
        ],
    )


def _cell(estimate: Estimate) -> Cell:
    return Cell(weight(estimate.value), under=numbers.interval(estimate, weight), value=estimate.value)
