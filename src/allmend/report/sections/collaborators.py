"""Who was pulled together: the graph that members' gradients have made, and how much it is worth."""

import math

from allmend.report import numbers
from allmend.report.evidence import Evidence
from allmend.report.heat_map import HeatCell, heat_map
from allmend.report.markup import Cell, Html, Rows, figure, join, paragraph, section, table, tag
from allmend.results import TOGETHER, ArmGraph, ArmGroups, Pair

FEW = 5.0
"""Probes of each pair, on average, below which the graph says little."""

MOST = 40
"""Members that the map has room for."""

NAMED = 6
"""Partners that are named."""


def collaborators(evidence: Evidence) -> Html:
    """The section; nothing where no arm has a graph."""
    found = evidence.collaborators
    if found is None or not (found.arms or found.grouped):
        return Html("")
    many = len(found.arms) + len(found.grouped) > 1
    intro = (
        "Which clients’ models were pulled towards each other? A weight near 1 says that both gradients pointed the "
        "same way between their models when they were compared. It is a statement about this training: where two "
        "clients have each fitted their own records, their gradients disagree even if the records are of one kind."
    )
    return section(
        "collaborators",
        "Who worked with whom",
        paragraph(intro) if found.arms else None,
        *(_arm(arm, many=many) for arm in found.arms),
        *(_groups(arm, many=many) for arm in found.grouped),
    )


def _arm(graph: ArmGraph, *, many: bool) -> Html:
    return join(
        [
            tag("h3", graph.arm) if many else None,
            paragraph(graph_in_words(graph)),
            *(paragraph(note, class_="missing") for note in notes_of(graph)),
            tag("div", figure("Weights of pairs", graph_map(graph)), class_="charts")
            if len(graph.members) > 1
            else None,
            table(
                f"Partners are those with a weight above {TOGETHER:g}, the closest first",
                ["Client", "Group", "Partners", "Mean weight", "Probes", "Last probe"],
                rows_of(graph),
            ),
        ]
    )


def _groups(found: ArmGroups, *, many: bool) -> Html:
    return join(
        [
            tag("h3", found.arm) if many else None,
            paragraph(groups_in_words(found)),
            table(
                "Mean cosine of a client’s gradient with those of its group, and with those of the nearest other group",
                ["Client", "Group", "Own group", "Next group"],
                rows_of_groups(found),
            ),
        ]
    )


def groups_in_words(found: ArmGroups) -> str:
    """How many there are, and what they rest on, in sentences."""
    n = len(found.members)
    if found.count == 1 and not found.alone:
        return (
            f"One group: the gradients of {numbers.counted(n, 'client')} at the model of round {found.round} say of no "
            "two groups that both halves of the records tell them apart. One model for all is trained on."
        )
    apart = f"; {', '.join(found.alone)} in none that is large enough, and alone" if found.alone else ""
    return (
        f"After round {found.round}, {numbers.counted(n, 'client')} stand in {numbers.counted(found.count, 'group')} "
        f"by where their gradients point at the model that all had until then{apart}. From then on each group has a "
        "model of its own. Who came later is in the group that is nearest."
    )


def rows_of_groups(found: ArmGroups) -> Rows:
    """A row for each client, group by group."""
    return [
        [
            one.member,
            Cell("alone" if one.group < 0 else str(one.group + 1), value=one.group),
            *(
                Cell("", value=-2.0) if mean is None else Cell(numbers.number(mean), value=mean)
                for mean in (one.own, one.next)
            ),
        ]
        for one in found.members
    ]


def _cosine(mean: float | None) -> Cell:
    return Cell("none", value=-2.0) if mean is None else Cell(numbers.number(mean), value=mean)


def graph_in_words(graph: ArmGraph) -> str:
    """Size, groups and state of a graph, in sentences."""
    n = len(graph.members)
    if n == 1:
        return "One client alone: nobody to work with, and training is local."
    if n == 2:
        (pair,) = graph.pairs
        return f"Two clients: the graph is one number, {numbers.number(pair.weight)} after round {graph.round}."
    groups = len(set(graph.groups))
    frozen = "It is frozen, and" if graph.frozen else "It"
    return (
        f"After round {graph.round}, {n} clients stand in {numbers.counted(groups, 'group')} (average linkage). "
        f"{frozen} rests on {numbers.number(graph.visits)} probes of each pair on average; "
        f"{numbers.percent(graph.probed)} of the pairs were probed."
    )


def notes_of(graph: ArmGraph) -> list[str]:
    """What to take with care."""
    notes = []
    if len(graph.members) > 1 and graph.visits < FEW:
        notes.append(
            f"Fewer than {FEW:g} probes of each pair say little about whom one works with: more rounds, or more pairs "
            "of each client and round, would say more."
        )
    lost = [name for name, count in graph.broken.items() if count >= 3]
    if lost:
        notes.append(f"Gradients that are no numbers, three times or more: {', '.join(lost)}.")
    return notes


def ordered(graph: ArmGraph) -> list[int]:
    """Members' places, group by group."""
    return sorted(range(len(graph.members)), key=lambda place: (graph.groups[place], place))


def graph_map(graph: ArmGraph) -> Html:
    """Weights, clients of a group side by side; pairs that were never probed are hatched."""
    places = ordered(graph)[:MOST]
    row = {place: at for at, place in enumerate(places)}
    cells = {}
    for pair in graph.pairs:
        if pair.one in row and pair.other in row:
            one, other = (graph.members[place] for place in (pair.one, pair.other))
            cell = HeatCell(pair.weight if pair.visits else math.nan, f"{one} and {other}\n{_tip(pair)}")
            cells[row[pair.one], row[pair.other]] = cells[row[pair.other], row[pair.one]] = cell
    names = [graph.members[place] for place in places]
    return heat_map(
        "Weights of pairs of clients",
        names,
        names,
        cells,
        low=0.0,
        high=1.0,
        quantity=f"weight after round {graph.round}",
        missing="never probed",
    )


def _tip(pair: Pair) -> str:
    if pair.product is None:
        return f"never probed; weight {numbers.number(pair.weight)}"
    agreed = "agreed" if pair.product > 0 else "disagreed"
    return (
        f"weight {numbers.number(pair.weight)}, {numbers.counted(pair.visits, 'probe')}; in round {pair.last} the "
        f"gradients {agreed}"
    )


def rows_of(graph: ArmGraph) -> Rows:
    """A row for each client, group by group."""
    rows: Rows = []
    for place in ordered(graph):
        pairs = graph.weights(place)
        partners = [graph.members[other] for other in graph.partners(place)]
        more = len(partners) - NAMED
        named = ", ".join(partners[:NAMED]) + (f" and {more} more" if more > 0 else "")
        mean = sum(pair.weight for pair in pairs.values()) / len(pairs) if pairs else 0.0
        probes = sum(pair.visits for pair in pairs.values())
        last = max(pairs.values(), key=lambda pair: pair.last, default=None)
        rows.append(
            [
                graph.members[place],
                Cell(str(graph.groups[place] + 1), value=graph.groups[place]),
                named or "none",
                Cell(numbers.number(mean), value=mean),
                Cell(numbers.count(probes), value=probes),
                "never"
                if last is None or last.product is None
                else f"round {last.last}, {'agreed' if last.product > 0 else 'disagreed'}",
            ]
        )
    return rows
