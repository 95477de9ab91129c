"""Who can see what, round by round: the broadcast model, single members' updates, their sum."""

from allmend.report import numbers
from allmend.report.charts import Axis, Point, Series, line_chart
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, figure, in_figures, measure, table, tag
from allmend.report.sections.extraction import copies_of
from allmend.report.sections.utility import cell
from allmend.results import AuditTable, View

MOST = 6
"""Members whose updates have a line; those with the largest gap."""
MOST_ROWS = 400
"""Rows of the table; beyond, it shows the last round alone."""


def seen(view: View) -> str:
    """What the party looks at, in words."""
    if view.party == "members":
        return "the broadcast model"
    return f"the update of {view.of}" if view.of else "the sum of updates"


def _key(view: View) -> str:
    return "members" if view.party == "members" else view.of or "sum"


def _chart(rows: list[View], model: str) -> Html:
    lines: dict[str, list[View]] = {}
    for view in sorted(rows, key=lambda v: v.round):
        lines.setdefault(_key(view), []).append(view)
    single = [key for key, views in lines.items() if views[0].of]
    kept = sorted(single, key=lambda key: -max(v.gap.value for v in lines[key]))[:MOST]
    series = []
    for i, key in enumerate(key for key in lines if key not in single or key in kept):
        points = []
        for view in lines[key]:
            words = f"{numbers.signed(view.gap.value)} nats per token, {numbers.evidence(view.gap, numbers.number)}"
            tip = f"{view.party}: {seen(view)}, round {view.round}\n{words}"
            points.append(Point(view.round, view.gap.value, tip, view.gap.low, view.gap.high))
        series.append(Series(key, key, i, tuple(points)))
    rounds = tuple(float(n) for n in sorted({v.round for v in rows}))
    y = Axis("log-likelihood over controls, nats per token", reference=0.0)
    drawn = line_chart(f"Gap by round, {model}", series, Axis("round", ticks=rounds), y, height=280)
    return tag("div", tag("h3", model), drawn)


def views(evidence: Evidence, audit: AuditTable) -> Html:
    """The likelihood gap in what each party receives."""
    if not audit.views:
        return Html("")
    most = max(v.copies for v in audit.views)
    models = list(dict.fromkeys(v.model for v in audit.views))
    charts = [_chart([v for v in audit.views if (v.model, v.copies) == (model, most)], model) for model in models]
    last = {model: max(v.round for v in audit.views if v.model == model) for model in models}
    shown = audit.views
    caption = "What each party can see: likelihood gap, nats per token (95 % interval; n canaries)"
    if len(shown) > MOST_ROWS:
        shown = tuple(v for v in shown if v.round == last[v.model])[:MOST_ROWS]
        caption += "; last round, the rest is in results/audit.json"
    body: Rows = [
        [
            v.model,
            Cell(numbers.count(v.round), value=v.round),
            v.party,
            seen(v),
            Cell(numbers.count(v.copies), value=v.copies),
            cell(v.gap, numbers.number, numbers.number),
        ]
        for v in shown
    ]
    top = max((v for v in audit.views if v.copies == most), key=lambda v: v.gap.value)
    headline = f"most, with {copies_of(most)}: {top.party} from {seen(top)}, round {top.round}, "
    headline += f"{numbers.signed(top.gap.value)} nats"
    return measure(
        "Who sees it, round by round",
        headline,
        figure(
            f"Likelihood gap in what each party receives, {copies_of(most)}",
            tag("div", *charts, class_="charts"),
            note="Members receive the broadcast model. The coordinator receives each member’s update, or under secure "
            "aggregation their sum alone. A line with a member’s name is its update, by its own canaries; “members” "
            "is the broadcast model. Bars are 95 % intervals.",
        ),
        in_figures(table(caption, ["Model", "Round", "Who looks", "At what", "Copies", "Gap"], body), len(body)),
    )
