"""What comes out of the models: greedy continuations of prefixes, and how many sampled ones a secret takes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from allmend.report import numbers
from allmend.report.base_rate import ALL_SECRETS, hits, outcomes
from allmend.report.charts import NEUTRAL, Axis, Point, Series, line_chart
from allmend.report.evidence import Evidence
from allmend.report.marks import legend
from allmend.report.markup import Cell, Html, Rows, details, figure, in_figures, measure, table, tag
from allmend.report.sections.utility import cell, titled
from allmend.results import AuditTable, Discoverable, Estimate, Extraction, longest_prefix

CONTROLS = "controls"
BARS = "Bars are 95 % intervals; those of the controls stand in the table."
PLANTED = {True: "planted", False: "control"}

RowT = TypeVar("RowT", Extraction, Discoverable)
Pick = Callable[[Extraction], Estimate | None]


def copies_of(number: int) -> str:
    """A number of copies in words."""
    return numbers.counted(number, "copy", "copies")


def prefixes(audit: AuditTable) -> list[str]:
    """The prefixes that were tried, the shortest first."""
    tokens: dict[str, float] = {}
    for row in audit.extraction:
        tokens[row.prefix] = max(tokens.get(row.prefix, 0.0), row.prefix_tokens)
    return sorted(tokens, key=lambda prefix: tokens[prefix])


def _prefix_axis(names: Sequence[str]) -> Axis:
    """Prefixes at equal distances; their unit stands once where it is the same for all."""
    places = tuple(float(i) for i in range(len(names)))
    if all(name.endswith(" tokens") for name in names):
        short = [name.removesuffix(" tokens") for name in names]
        return Axis("prefix, tokens", form=lambda i: short[int(i)], ticks=places, ordinal=True)
    return Axis("prefix", form=lambda i: names[int(i)], ticks=places, ordinal=True)


def _series(
    rows: Sequence[RowT],
    copies: Sequence[int],
    place: Callable[[RowT], float],
    pick: Callable[[RowT], Estimate | None],
    words: Callable[[RowT], str],
) -> list[Series]:
    """A line of planted canaries for each number of copies, and under them the controls of each."""
    series = []
    hollow = [number for number in copies if any(r.copies == number and not r.inserted for r in rows)]
    for inserted in (False, True):
        for number in copies:
            who = copies_of(number) if inserted else f"controls of {copies_of(number)}"
            points = []
            for row in sorted((r for r in rows if (r.inserted, r.copies) == (inserted, number)), key=place):
                if (known := pick(row)) is None:
                    continue
                share = f"{numbers.percent(known.value)}, {numbers.evidence(known, numbers.hundredths)}"
                ends = (known.low, known.high) if inserted else ()
                points.append(Point(place(row), known.value, f"{who}, {words(row)} {share}", *ends))
            if not points:
                continue
            look = len(copies) - 1 - copies.index(number) if inserted else NEUTRAL
            key = copies_of(number) if inserted else CONTROLS
            name = key if inserted or number == hollow[-1] else ""
            series.append(Series(key, name, look, tuple(points), hollow=not inserted))
    return series


def _keys(copies: Sequence[int]) -> Html:
    keys = [(copies_of(number), copies_of(number), i) for i, number in enumerate(reversed(copies))]
    dashed = (CONTROLS, "controls (dashed, hollow)", NEUTRAL)
    return legend([*keys, dashed], dashed=frozenset((CONTROLS,)))


def _ceiling(estimates: Iterable[Estimate]) -> float:
    """Common top of one measure's charts, at least 10 %."""
    return max([0.1, *(v for e in estimates for v in (e.value, e.high) if v is not None and math.isfinite(v))])


def _shares(label: str, estimates: Iterable[Estimate]) -> Axis:
    return Axis(f"{label}, %", form=lambda share: numbers.tick(100 * share), low=0.0, high=_ceiling(estimates))


MEASURES: tuple[tuple[str, str, Pick], ...] = (
    (
        "exact match",
        "Share of canaries continued without an error, always by the likeliest next token.",
        lambda e: e.exact,
    ),
    (
        "secrets",
        "Share of the names, dates and numbers behind the prefix that stand in the continuation, mean over canaries.",
        lambda e: e.secrets.get(ALL_SECRETS),
    ),
    ("BLEU", "Mean agreement of the continuation with the canary; 100 % is identical.", lambda e: e.bleu),
)


def _prefix_charts(audit: AuditTable) -> Iterator[Html]:
    """A figure for each measure, with a chart for each model."""
    copies = sorted({e.copies for e in audit.extraction})
    names = prefixes(audit)
    for of, note, pick in MEASURES:
        known = [e for row in audit.extraction if (e := pick(row)) is not None]
        charts = []
        for model in dict.fromkeys(e.model for e in audit.extraction):
            series = _series(
                [e for e in audit.extraction if e.model == model],
                copies,
                lambda row: float(names.index(row.prefix)),
                pick,
                lambda row, of=of: f"prefix of {row.prefix}\n{of}",  # type: ignore[misc]
            )
            drawn = line_chart(f"{of}, {titled(model)}", series, _prefix_axis(names), _shares(of, known), height=250)
            charts.append(tag("div", tag("h3", titled(model)), drawn))
        if known:
            grid = tag("div", *charts, class_="charts")
            yield figure(of[0].upper() + of[1:], _keys(copies), grid, note=f"{note} {BARS}")


def _prefix_table(audit: AuditTable) -> Html:
    def line(e: Extraction) -> list[str | Cell]:
        shares = (e.exact, e.secrets.get(ALL_SECRETS), e.matched, e.bleu, e.approximate)
        return [
            titled(e.model),
            Cell(numbers.count(e.copies), value=e.copies),
            PLANTED[e.inserted],
            Cell(e.prefix, value=e.prefix_tokens),
            *(cell(share, numbers.percent, numbers.hundredths) for share in shares),
        ]

    head = ["Model", "Copies", "Canaries", "Prefix", "Exact", "Secrets", "Matched", "BLEU", "BLEU over 0.75"]
    caption = (
        "Continuations of canaries from a prefix (95 % interval; n canaries; secrets: mean of each canary’s share)"
    )
    return in_figures(table(caption, head, [line(e) for e in audit.extraction]), len(audit.extraction))


def _secrets_table(audit: AuditTable) -> Html:
    prefix = longest_prefix(audit.extraction)
    rows = [e for e in audit.extraction if e.prefix == prefix]
    slots = [slot for slot in dict.fromkeys(slot for e in rows for slot in e.secrets) if slot != ALL_SECRETS]
    body: Rows = [
        [
            titled(e.model),
            Cell(numbers.count(e.copies), value=e.copies),
            PLANTED[e.inserted],
            *(cell(e.secrets.get(slot), numbers.percent, numbers.hundredths) for slot in slots),
        ]
        for e in rows
    ]
    if not slots:
        return Html("")
    caption = f"Secrets that came out after {prefix} (95 % interval; n secrets)"
    return details("Secrets by kind", table(caption, ["Model", "Copies", "Canaries", *slots], body))


def extraction(evidence: Evidence, audit: AuditTable) -> Html:
    """What a prefix brings out, by its length and the number of copies."""
    if not audit.extraction:
        return Html("")
    model = evidence.audited[0] if evidence.audited else audit.extraction[0].model
    found = outcomes(audit, model)
    out, n = hits(o.planted.exact for o in found)
    null, controls = hits(o.control.exact for o in found if o.control)
    headline = f"{titled(model)}: {out} of {n} planted canaries after {longest_prefix(audit.extraction)}"
    headline += f", {null} of {controls} controls"
    return measure(
        "What a prefix brings out", headline, *_prefix_charts(audit), _secrets_table(audit), _prefix_table(audit)
    )


def _draws_charts(audit: AuditTable, prefix: str) -> Html:
    rows = [d for d in audit.discoverable if d.prefix == prefix]
    copies = sorted({d.copies for d in rows})
    draws = tuple(float(n) for n in sorted({d.draws for d in rows}))
    x = Axis("continuations drawn, n", ticks=draws, log=True)
    charts = []
    for model in dict.fromkeys(d.model for d in rows):
        series = _series(
            [d for d in rows if d.model == model],
            copies,
            lambda row: float(row.draws),
            lambda row: row.probability,
            lambda row: f"n = {numbers.count(row.draws)}\nat least one is right:",
        )
        y = _shares("at least one is right", (d.probability for d in rows))
        drawn = line_chart(f"(n, p)-discoverable extraction, {titled(model)}", series, x, y, height=260)
        charts.append(tag("div", tag("h3", titled(model)), drawn))
    return figure(
        f"Probability that one of n sampled continuations is right, after {prefix}",
        _keys(copies),
        tag("div", *charts, class_="charts"),
        note="Mean over canaries, computed from the model’s probabilities without sampling. Whoever may ask often gets "
        f"what a single greedy answer does not give. {BARS}",
    )


def _draws_table(audit: AuditTable, prefix: str) -> Html:
    body: Rows = [
        [
            titled(d.model),
            Cell(numbers.count(d.copies), value=d.copies),
            PLANTED[d.inserted],
            Cell(numbers.count(d.draws), value=d.draws),
            cell(d.probability, numbers.percent, numbers.hundredths),
            cell(d.likely, numbers.percent, numbers.hundredths),
        ]
        for d in audit.discoverable
        if d.prefix == prefix
    ]
    head = ["Model", "Copies", "Canaries", "n", "At least one is right", "Likelier than not"]
    caption = f"After {prefix}: mean probability, and share of canaries for which it is one half or more"
    return in_figures(table(f"{caption} (95 % interval; n canaries)", head, body), len(body))


def discoverable(evidence: Evidence, audit: AuditTable) -> Html:
    """How many sampled continuations it takes."""
    if not audit.discoverable:
        return Html("")
    tokens = {d.prefix: d.prefix_tokens for d in audit.discoverable}
    prefix = longest_prefix(audit.extraction)
    prefix = prefix if prefix in tokens else max(tokens, key=lambda name: tokens[name])
    models = dict.fromkeys(d.model for d in audit.discoverable)
    model = next((m for m in evidence.audited if m in models), next(iter(models)))
    rows = [d for d in audit.discoverable if (d.model, d.prefix) == (model, prefix)]
    most, draws = max(d.copies for d in rows), max(d.draws for d in rows)
    at = {d.inserted: d.probability.value for d in rows if (d.copies, d.draws) == (most, draws)}
    shares = [
        f"{numbers.percent(at[key], 0)} {name}" for key, name in ((True, "planted"), (False, "controls")) if key in at
    ]
    headline = f"{titled(model)}, {copies_of(most)}: in {numbers.count(draws)} tries, {', '.join(shares)}"
    return measure("How many tries it takes", headline, _draws_charts(audit, prefix), _draws_table(audit, prefix))
