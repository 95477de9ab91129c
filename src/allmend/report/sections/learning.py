"""How the loss fell: every client's training loss by step, an arm beside the other."""

from collections.abc import Sequence
from statistics import fmean

from allmend.events import StepDone
from allmend.report import numbers
from allmend.report.charts import NEUTRAL, Axis, Point, Series, line_chart
from allmend.report.evidence import Evidence
from allmend.report.marks import legend
from allmend.report.markup import Cell, Html, Rows, details, figure, paragraph, section, table, tag

MOST = 8
"""Clients that have a line each; with more, the lines are faint and their mean is drawn."""
MOST_POINTS = 300
"""Points of a line; longer logs are averaged in stretches."""
MOST_FAINT = 40
MOST_CELLS = 3000
"""Figures in the table of losses; beyond, it shows every second, third … round and the last."""
SAID = "step {x}\nloss {y} (mean)"
"""Of a place on a line."""

Curve = tuple[tuple[float, float], ...]


def thinned(curve: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> Curve:
    """At most `most` points, each the mean of a stretch of neighbours."""
    stretch = -(-len(curve) // most)
    parts = [curve[i : i + stretch] for i in range(0, len(curve), max(1, stretch))]
    return tuple((fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts)


def smoothed(curve: Sequence[tuple[float, float]], reach: int) -> Curve:
    """Mean over up to `reach` neighbours on each side; symmetric where the curve begins, since it falls there."""
    values = []
    for i, (x, _) in enumerate(curve):
        k = min(reach, i)
        values.append((x, fmean(y for _, y in curve[i - k : i + k + 1])))
    return tuple(values)


def reach_of(length: int) -> int:
    """Neighbours on each side to smooth over: a twelfth of the curve, between 1 and 25; none in a very short one."""
    return min(25, max(1, length // 12)) if length > 4 else 0


def _rounds(steps: Sequence[StepDone]) -> dict[int, float]:
    """Loss by round, weighted by tokens."""
    by_round: dict[int, list[StepDone]] = {}
    for step in steps:
        by_round.setdefault(step.round, []).append(step)
    return {
        number: sum(s.loss * s.tokens for s in done) / max(1, sum(s.tokens for s in done))
        if any(s.tokens for s in done)
        else fmean(s.loss for s in done)
        for number, done in by_round.items()
    }


def _series(client: str, look: int, steps: Sequence[StepDone]) -> Series:
    raw = [(float(step.step), step.loss) for step in steps]
    smooth = thinned(smoothed(raw, reach_of(len(raw))))
    ends = {step.round: step.step for step in steps}
    at = dict(smooth)
    points = []
    for number, mean in _rounds(steps).items():
        x = min(at, key=lambda known: abs(known - ends[number]))
        tip = f"{client}, end of round {number} (step {ends[number]})"
        tip += f"\nloss {numbers.number(at[x])} (mean), over the round {numbers.number(mean)}"
        points.append(Point(x, at[x], tip))
    return Series(client, client, look, tuple(points), trace=smooth, faint=thinned(raw), said=SAID)


def _crowd(by_client: dict[str, list[StepDone]]) -> list[Series]:
    """Many clients: faint lines and their mean by step."""
    by_step: dict[int, list[float]] = {}
    for steps in by_client.values():
        for step in steps:
            by_step.setdefault(step.step, []).append(step.loss)
    mean = thinned([(float(step), fmean(losses)) for step, losses in sorted(by_step.items())])
    several = [
        Series("each", "", NEUTRAL, faint=thinned([(float(s.step), s.loss) for s in steps], MOST_POINTS // 3))
        for steps in list(by_client.values())[:MOST_FAINT]
    ]
    return [*several, Series("mean", f"mean of {len(by_client)}", 0, trace=mean, said=SAID)]


def _chart(evidence: Evidence, arm: str, clients: list[str], top: float) -> Html:
    by_client = evidence.steps[arm]
    if len(by_client) > MOST:
        series = _crowd(by_client)
    else:
        series = [_series(name, clients.index(name), steps) for name, steps in by_client.items()]
    y = Axis("loss, nats per token", low=0.0, high=top)
    chart = line_chart(f"Training loss of {arm}", series, Axis("step of the client"), y, height=280)
    return tag("div", tag("h3", arm), chart)


def _table(evidence: Evidence, arm: str) -> Html:
    by_client = {client: _rounds(steps) for client, steps in evidence.steps[arm].items()}
    every = sorted({number for losses in by_client.values() for number in losses})
    stride = max(1, -(-len(every) * len(by_client) // MOST_CELLS))
    rounds = every[::stride] if every[-1] in every[::stride] else [*every[::stride], every[-1]]
    body: Rows = []
    for client, losses in by_client.items():
        row: list[str | Cell] = [client, Cell(numbers.count(n := len(evidence.steps[arm][client])), value=n)]
        for number in rounds:
            loss = losses.get(number)
            row.append(Cell(numbers.NONE) if loss is None else Cell(numbers.number(loss), value=loss))
        body.append(row)
    head = ["Client", "Steps", *(f"Round {number}" for number in rounds)]
    return table(f"{arm}: mean training loss by round, nats per token", head, body)


def _arms(evidence: Evidence) -> Html:
    body: Rows = [
        [
            name,
            arm.strategy,
            f"{len(evidence.rounds.get(name, []))} of {arm.rounds}",
            Cell(numbers.count(arm.trainable), value=arm.trainable),
            _tokens(sum(r.tokens for r in evidence.rounds.get(name, []))),
        ]
        for name, arm in evidence.arms.items()
    ]
    return table("Arms", ["Arm", "Strategy", "Rounds", "Trainable parameters", "Tokens trained on"], body)


def _tokens(count: int) -> Cell | str:
    """Tokens, or that nobody told: members on other machines do not."""
    return Cell(numbers.count(count), value=count) if count else numbers.NONE


def learning(evidence: Evidence) -> Html:
    """The section."""
    if not evidence.steps:
        elsewhere = evidence.start is not None and not evidence.start.clients and evidence.rounds
        words = "Members keep the losses of their steps to themselves." if elsewhere else "No step was logged yet."
        return section("learning", "How the loss fell", _arms(evidence), paragraph(words, class_="missing"))
    clients = evidence.clients
    losses = sorted(s.loss for by_client in evidence.steps.values() for steps in by_client.values() for s in steps)
    top = losses[min(len(losses) - 1, int(0.995 * len(losses)))]
    crowd = any(len(by_client) > MOST for by_client in evidence.steps.values())
    keys = [] if crowd else [(name, name, i) for i, name in enumerate(clients)]
    note = "Faint: each step. Strong: mean over neighbouring steps. Markers: ends of rounds. "
    if crowd:
        note = f"Faint: clients, at most {MOST_FAINT} of them. Strong: mean over all clients by step. "
    note += "Each client counts its own steps."
    return section(
        "learning",
        "How the loss fell",
        figure(
            "Training loss by client",
            legend(keys) if keys else None,
            tag("div", *(_chart(evidence, arm, clients, top) for arm in evidence.steps), class_="charts"),
            note=note,
        ),
        _arms(evidence),
        details("Loss by round and client", *(_table(evidence, arm) for arm in evidence.steps)),
    )
