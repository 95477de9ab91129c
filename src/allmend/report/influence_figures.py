"""What the pages about influence share: records with their scores, how scores spread, and clients' means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from allmend.report import numbers
from allmend.report.charts import NEUTRAL, Axis, Row, interval_plot
from allmend.report.findings import verdict
from allmend.report.heat_map import HeatCell, heat_map
from allmend.report.histograms import Sample, far_out, histograms
from allmend.report.marks import DASHES
from allmend.report.markup import Cell, Html, Rows, figure, table
from allmend.results import Estimate, MemberInfluence

MOST = 25
"""Records listed at either end."""
MOST_CLIENTS = len(DASHES)
"""Clients that have a histogram of their own; the others share one."""
MOST_MAPPED = 30
"""Rows and columns of a map of clients and targets."""
NEAR = 0.1
"""Balance of a client's scores below which they cancel."""
SURE = 0.7
"""Rank correlation of two halves of the target records from which on their orders are about the same."""
MARK = "?"
"""Beside a score that is to be taken with care."""
UNIT = "in units of the mean absolute score of all these records"


@dataclass(frozen=True)
class ScoredRecord:
    """A record and what it did for a target.

    Attributes:
        id: of the record.
        target: what it did something for.
        score: above 0 where training on the record lowers the target's loss.
        rank: 1 for the most helpful of the records that were ranked together.
        loss: per token (nats).
        text: of the record.
        client: whose it is; empty where all are one client's.
    """

    id: str
    target: str
    score: float
    rank: int
    loss: float
    text: str
    client: str = ""


def ends(records: Sequence[ScoredRecord], most: int = MOST) -> tuple[list[ScoredRecord], list[ScoredRecord]]:
    """The most helpful of a target's records, and the most harmful, each with its like at the head; none is in both."""
    ordered = sorted(records, key=lambda record: record.rank)
    some = min(most, (len(ordered) + 1) // 2)
    helpful = [record for record in ordered[:some] if record.score > 0]
    harmful = [record for record in reversed(ordered[-some:]) if record.score < 0]
    return helpful, harmful


def record_table(
    caption: str, records: Sequence[ScoredRecord], *, letters: int, of: int, unit: float | None = None, mark: str = ""
) -> Html:
    """Records with the beginning of their text; nothing without any.

    Args:
        caption: of the table.
        records: in order.
        letters: of a record's text, at most.
        of: how many were ranked together.
        unit: a score that is called 1, with the score as it stands in the files below; as it stands where None.
        mark: beside each score.
    """
    clients = any(record.client for record in records)
    rows: Rows = []
    for record in records:
        shown, below = numbers.signed(record.score), ""
        if unit is not None:
            shown, below = numbers.signed(record.score / unit), shown
        rows.append(
            [
                beginning(record.text, letters),
                record.id,
                *([record.client] if clients else []),
                Cell(f"{shown} {mark}".rstrip(), below, record.score),
                Cell(numbers.number(record.loss), value=record.loss),
                Cell(numbers.count(record.rank), f"of {numbers.count(of)}", record.rank),
            ]
        )
    head = ["Record", "Id", *(["Client"] if clients else []), "Score", "Loss per token (nats)", "Rank"]
    return table(caption, head, rows)


def beginning(words: str, letters: int) -> str:
    """The first letters of a text, on one line."""
    line = " ".join(words.split())
    return line if len(line) <= letters else line[: letters - 1].rstrip() + "…"


def typical(scores: Sequence[float]) -> float:
    """The mean absolute score, to be called 1; 1 where all are 0."""
    return fmean(map(abs, scores)) or 1.0


def score_histograms(
    by_client: Mapping[str, Sequence[float]], looks: Mapping[str, int], *, title: str, unit: str = ""
) -> Html:
    """How the scores of each client spread; nothing where all are equal.

    Args:
        by_client: scores; of one client, its name may be empty. Clients with few records share a histogram where there
            are many clients.
        looks: of the clients, see `marks`.
        title: of the figure.
        unit: of the scores, in words.
    """
    own, others = dict(by_client), []
    if len(by_client) > MOST_CLIENTS:
        most = sorted(by_client, key=lambda client: -len(by_client[client]))[: MOST_CLIENTS - 1]
        own = {client: scores for client, scores in by_client.items() if client in most}
        others = [client for client in by_client if client not in most]
    samples = [Sample(client, client, looks.get(client, 0), tuple(scores)) for client, scores in own.items()]
    if others:
        rest = tuple(score for client in others for score in by_client[client])
        samples.append(Sample("others", f"and {len(others)} more", NEUTRAL, rest))
    drawn = histograms(title, samples, Axis("score", reference=0.0))
    if not drawn:
        return drawn
    whose = "the client’s records" if len(samples) > 1 else "the records"
    note = f"Each bar counts records, as a share of {whose}. "
    if unit:
        note += f"Scores are {unit}. "
    if far_out(samples):
        note += "The outermost bars hold what lies beyond, too. "
    if others:
        note += "Clients with the fewest records are together in the last row. "
    return figure(title, drawn, note=note.rstrip())


def client_means(
    told: Mapping[str, Sequence[MemberInfluence]], looks: Mapping[str, int], *, title: str = "Mean score by client"
) -> Html:
    """The interval plot of clients' mean scores, by target.

    Args:
        told: figures in units of the mean absolute score, by target.
        looks: of the clients, see `marks`.
        title: of the figure.
    """
    groups = []
    for target, found in told.items():
        lines = []
        for one in found:
            shown, look = numbers.signed(one.mean.value), looks.get(one.client, 0)
            tip = _tip(one)
            lines.append(Row(one.client, one.client, look, one.mean.value, shown, tip, one.mean.low, one.mean.high))
        groups.append((target if len(told) > 1 else "", lines))
    return figure(
        title,
        interval_plot(title, groups, Axis("mean score", form=numbers.tick, reference=0.0)),
        note=f"{UNIT[0].upper()}{UNIT[1:]}, with 95 % intervals over a client’s records. Intervals that overlap say "
        "nothing about an order.",
    )


def client_map(told: Mapping[str, Sequence[MemberInfluence]], clients: Sequence[str]) -> Html:
    """The heat map of clients' mean scores by target.

    Args:
        told: figures in units of the mean absolute score, by target.
        clients: in their order.
    """
    targets, rows = list(told)[:MOST_MAPPED], list(clients)[:MOST_MAPPED]
    cells = {}
    for j, target in enumerate(targets):
        known = {one.client: one for one in told[target]}
        for i, client in enumerate(rows):
            one = known.get(client)
            tip = _tip(one) if one else f"{client} for {target}\nno score"
            shown = numbers.signed(one.mean.value) if one else ""
            cells[i, j] = HeatCell(one.mean.value if one else float("nan"), tip, shown)
    title = "Mean score by client and target"
    left_out = [
        f"{kind} {numbers.count(MOST_MAPPED)} of {numbers.count(len(some))}"
        for kind, some in (("clients", clients), ("targets", told))
        if len(some) > MOST_MAPPED
    ]
    note = "In units of the mean absolute score of all records for a target. Pointing at a figure shows its interval."
    if left_out:
        note += f" Shown: {', '.join(left_out)}."
    drawn = heat_map(
        title,
        rows,
        targets,
        cells,
        middle=0.0,
        form=numbers.signed,
        quantity="mean score",
        column_name="target",
        missing="no score",
    )
    return figure(title, drawn, note=note)


def client_table(told: Mapping[str, Sequence[MemberInfluence]]) -> Html:
    """The same figures in a table, with the share of records below 0 and the balance."""
    many = len(told) > 1
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
        for found in told.values()
        for one in found
    ]
    head = ["Client", *(["Target"] if many else []), "Mean score", "Records below 0", "Balance"]
    return table(
        "Scores by client, in units of the mean absolute score (95 % interval; n records). Balance: their sum over "
        "their absolute sum",
        head,
        rows,
    )


def helped_and_hurt(told: Mapping[str, Sequence[MemberInfluence]]) -> str:
    """Whose records helped and whose hurt, as far as intervals say."""
    words = []
    for target, found in told.items():
        of = f"For {target}: " if len(told) > 1 else ""
        said = [
            f"{verb}: {', '.join(one.client for one in found if verdict(one.mean) == which)}"
            for verb, which in (("helped", 1), ("hurt", -1), ("unclear", 0))
            if any(verdict(one.mean) == which for one in found)
        ]
        line = of + "; ".join(said) + "."
        words.append(line[0].upper() + line[1:])
        if any(abs(one.balance) < NEAR for one in found):
            words.append(
                "Where a client’s scores nearly cancel (balance near 0), a negative mean says “less than the others”, "
                "not “harmful”."
            )
    return " ".join(words)


def how_sure(agrees: Estimate) -> str:
    """Whether the order of records is to be relied on, by the rank correlation of two halves of the target records."""
    if agrees.value > SURE:
        return "two halves of the target records give about the same order"
    return "two halves of the target records give different orders: take single records with care"


def _tip(one: MemberInfluence) -> str:
    words = numbers.evidence(one.mean, numbers.signed)
    return f"{one.client} for {one.target}\nmean score {numbers.signed(one.mean.value)}, {words}"
