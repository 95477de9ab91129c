"""What travelled between members and coordinator, and where the time went."""

from allmend.events import RoundDone
from allmend.report import numbers
from allmend.report.charts import Axis, Point, Series, bars, line_chart
from allmend.report.evidence import Evidence
from allmend.report.marks import legend
from allmend.report.markup import Cell, Html, Rows, details, figure, paragraph, section, table, tag

MOST_BARS = 24
MOST_CELLS = 600
"""Rows of the table by round and client; beyond, the sums by client stand alone."""
SENT, RECEIVED = "to members", "from members"


def _size(octets: float) -> Cell:
    return Cell(numbers.size(octets), value=octets)


def _time(seconds: float) -> Cell:
    return Cell(numbers.duration(seconds), value=seconds)


def _octets(rounds: list[RoundDone]) -> int:
    return sum(sum((*r.sent.values(), *r.received.values())) for r in rounds)


def _chart(arm: str, rounds: list[RoundDone]) -> Html:
    sent = [float(sum(r.sent.values())) for r in rounds]
    received = [float(sum(r.received.values())) for r in rounds]
    y = Axis("bytes per round, all members", form=numbers.size, low=0.0)
    title = f"Bytes exchanged per round by {arm}"
    if len(rounds) <= MOST_BARS:
        places = [str(r.round) for r in rounds]
        chart = bars(title, places, [(SENT, SENT, 0, sent), (RECEIVED, RECEIVED, 1, received)], "round", y)
    else:
        series = []
        for i, (name, values) in enumerate(((SENT, sent), (RECEIVED, received))):
            points = [
                Point(r.round, value, f"{name}, round {r.round}\n{numbers.size(value)}")
                for r, value in zip(rounds, values, strict=True)
            ]
            series.append(Series(name, name, i, tuple(points)))
        chart = line_chart(title, series, Axis("round"), y)
    return tag("div", tag("h3", arm), chart)


def _by_round(evidence: Evidence) -> Html:
    body: Rows = []
    for arm, rounds in evidence.rounds.items():
        for r in rounds:
            rest = r.seconds - r.training_seconds
            share = rest / r.seconds if r.seconds else 0.0
            loss = Cell(numbers.NONE) if r.loss is None else Cell(numbers.number(r.loss), value=r.loss)
            body.append(
                [
                    arm,
                    Cell(str(r.round), value=r.round),
                    Cell(numbers.count(len(r.clients)), value=len(r.clients)),
                    _size(sum(r.sent.values())),
                    _size(sum(r.received.values())),
                    _time(r.training_seconds),
                    _time(rest),
                    Cell(numbers.percent(share), value=share),
                    loss,
                ]
            )
    # members on other machines do not tell how long they train: what is known is how long they were waited for
    work = "Waiting for members" if evidence.offered else "Training"
    left = "aggregation and checkpoint" if evidence.offered else "exchange, aggregation and checkpoint"
    head = ["Arm", "Round", "Members", "To members", "From members", work, "Rest", "Rest, share", "Loss"]
    caption = f"Rounds: bytes and seconds; the rest is {left}"
    return table(caption, head, body)


def _by_client(loud: dict[str, list[RoundDone]]) -> Html:
    body: Rows = []
    for arm, rounds in loud.items():
        for client in dict.fromkeys(name for r in rounds for name in (*r.sent, *r.received)):
            sent = [r.sent.get(client, 0) for r in rounds]
            received = [r.received.get(client, 0) for r in rounds]
            largest = max(*sent, *received)
            row = [_size(sum(sent)), _size(sum(received)), _size(largest)]
            body.append([arm, client, *row])
    head = ["Arm", "Client", "To the member", "From the member", "Largest message"]
    return table("Bytes by client over all rounds", head, body)


def _all_messages(loud: dict[str, list[RoundDone]]) -> Html | None:
    body: Rows = [
        [arm, client, Cell(str(r.round), value=r.round), _size(r.sent.get(client, 0)), _size(r.received.get(client, 0))]
        for arm, rounds in loud.items()
        for r in rounds
        for client in dict.fromkeys((*r.sent, *r.received))
    ]
    if not 0 < len(body) <= MOST_CELLS:
        return None
    head = ["Arm", "Client", "Round", "To the member", "From the member"]
    whole = table("Bytes by round and client", head, body)
    return details(f"By round and client ({numbers.counted(len(body), 'row')})", whole)


def _phases(evidence: Evidence) -> Html:
    body: Rows = []
    for arm, rounds in evidence.rounds.items():
        if f"train {arm}" not in evidence.phases:  # stopped before the phase was over
            body.append([f"rounds of {arm} so far", _time(sum(r.seconds for r in rounds))])
    for phase, seconds in evidence.phases.items():
        body.append([phase, _time(seconds)])
    return table("Where the time went", ["Phase", "Time"], body)


def exchange(evidence: Evidence) -> Html:
    """The section."""
    title = "What was exchanged"
    if not evidence.rounds:
        return section("exchange", title, paragraph("No round is complete yet.", class_="missing"), _phases(evidence))
    loud = {arm: rounds for arm, rounds in evidence.rounds.items() if _octets(rounds)}
    silent = [arm for arm in evidence.rounds if arm not in loud]
    pooling = [name for name, arm in evidence.arms.items() if arm.strategy == "centralised"]
    words = "Bytes of the messages between each member and the coordinator."
    if silent:
        words += f" No message travelled in: {', '.join(silent)}."
    if pooling:
        words += f" A baseline that would need all records in one place: {', '.join(pooling)}."
    drawn = figure(
        "Bytes by round",
        legend([(SENT, SENT, 0), (RECEIVED, RECEIVED, 1)], kind="bar", dashed=frozenset((RECEIVED,))),
        tag("div", *(_chart(arm, rounds) for arm, rounds in loud.items()), class_="charts"),
    )
    return section(
        "exchange",
        title,
        paragraph(words),
        tag("div", drawn if loud else None, tag("div", _by_client(loud), _phases(evidence)), class_="charts"),
        _by_round(evidence),
        _all_messages(loud),
    )
