"""What the models can do: accuracy and perplexity on held-out records, and differences with their intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from allmend.report import numbers
from allmend.report.charts import NEUTRAL, Axis, Row, interval_plot
from allmend.report.evidence import Evidence
from allmend.report.marks import legend
from allmend.report.markup import Cell, Html, Rows, details, figure, paragraph, section, table, tag
from allmend.report.numbers import Format
from allmend.results import BASE, POOLED, Difference, Estimate, Utility

MOST = 12
"""Held-out sets that a chart shows beside the pooled one."""
MOST_ROWS = 600
"""Rows of the table of everything; beyond, personal models on others' sets are left to the file."""

Pick = Callable[[Utility], Estimate | None]


def look(evidence: Evidence, model: str) -> int:
    """The base model is neutral, the arms have a colour each."""
    return NEUTRAL if model == BASE else evidence.models.index(model) - 1


def titled(model: str) -> str:
    """A model's name on the page."""
    return "base model" if model == BASE else model


def cell(estimate: Estimate | None, form: Format, ends: Format) -> str | Cell:
    """A figure for a table, with interval and sample size under it."""
    if estimate is None:
        return Cell(numbers.NONE)
    interval = numbers.interval(estimate, ends)
    under = f"{interval}; {numbers.sample(estimate)}" if interval else numbers.sample(estimate)
    return Cell(form(estimate.value), under, estimate.value)


def _accuracy(row: Utility) -> Estimate | None:
    return row.accuracy


def _perplexity(row: Utility) -> Estimate | None:
    return row.perplexity


def mean_of(rows: Sequence[Utility], pick: Pick) -> Estimate | None:
    """Mean over members' personal models, without an interval."""
    known = [estimate for row in rows if (estimate := pick(row)) is not None]
    return Estimate(value=fmean(e.value for e in known), n=known[0].n) if known else None


def _columns(evidence: Evidence) -> list[tuple[str, str, Callable[[str, Pick], Estimate | None]]]:
    """Models to set side by side: their key, their name, and their figure on a held-out set."""

    def common(model: str) -> Callable[[str, Pick], Estimate | None]:
        def figure_of(held_out: str, pick: Pick) -> Estimate | None:
            row = evidence.row(model, held_out)
            return pick(row) if row else None

        return figure_of

    def own(model: str) -> Callable[[str, Pick], Estimate | None]:
        def figure_of(held_out: str, pick: Pick) -> Estimate | None:
            row = evidence.row(model, held_out, held_out)
            return pick(row) if row else None

        return figure_of

    def mean(model: str) -> Callable[[str, Pick], Estimate | None]:
        return lambda held_out, pick: mean_of(evidence.members_rows(model, held_out), pick)

    columns = [(model, titled(model), common(model)) for model in [BASE, *evidence.shared]]
    for model in evidence.personal:
        columns.append((model, f"{model}, own model", own(model)))
        columns.append((f"{model} mean", f"{model}, mean of members", mean(model)))
    return columns


def _accuracy_plot(evidence: Evidence) -> Html:
    groups = []
    for held_out in [POOLED, *evidence.clients[:MOST]]:
        rows = []
        for key, name, figure_of in _columns(evidence):
            is_mean = key.endswith(" mean")
            if is_mean != (held_out == POOLED) and key.removesuffix(" mean") in evidence.personal:
                continue  # on its own specialty a member's own model counts, on the pooled set the mean of all
            estimate = figure_of(held_out, _accuracy)
            if estimate is None:
                continue
            model = key.removesuffix(" mean") if is_mean else key
            words = numbers.evidence(estimate, numbers.hundredths)
            tip = f"{name} on {held_out}\n{numbers.percent(estimate.value)}, {words}"
            ends = numbers.interval(estimate, lambda v: numbers.hundredths(v, 0))
            shown = numbers.percent(estimate.value, 0) + (f" ({ends})" if ends else "")
            brief = name.replace(", mean of members", ", mean").replace(", own model", ", own")
            low, high = estimate.low, estimate.high
            rows.append(Row(model, brief, look(evidence, model), estimate.value, shown, tip, low, high))
        if rows:
            groups.append(("all clients’ questions (pooled)" if held_out == POOLED else held_out, rows))
    if not groups:
        return Html("")
    more = len(evidence.clients) - MOST
    note = "Share of held-out questions answered right, with 95 % intervals. On its own questions each member’s "
    note += "own model stands beside the shared one."
    note += f" {more} more clients are in the table." if more > 0 else ""
    keys = [(model, titled(model), look(evidence, model)) for model in [BASE, *evidence.shared, *evidence.personal]]
    pooled = evidence.row(BASE, POOLED)
    chance = pooled.chance if pooled else None
    note += f" The strong line is guessing ({numbers.percent(chance, 0)})." if chance is not None else ""
    axis = Axis("accuracy, %", form=lambda share: numbers.tick(100 * share), low=0.0, reference=chance)
    return figure(
        "Accuracy on held-out questions",
        legend([key for key in keys if any(row.key == key[0] for _, rows in groups for row in rows)], kind="marker"),
        interval_plot("Accuracy on held-out questions", groups, axis),
        note=note,
    )


def _named(evidence: Evidence, difference: Difference) -> str:
    other = titled(difference.other)
    if difference.other in evidence.personal:
        other += ", mean of members" if difference.other_is_member_mean else ", own model"
    return f"{titled(difference.model)} − {other}"


def _pooled_first(evidence: Evidence) -> list[Difference]:
    """Differences by what is compared, the pooled set first."""
    known = evidence.utility.differences if evidence.utility else ()
    kinds = list(dict.fromkeys((d.model, d.other) for d in known))
    return sorted(known, key=lambda d: (kinds.index((d.model, d.other)), d.held_out != POOLED))


@dataclass(frozen=True)
class _Measure:
    """What models differ in.

    Attributes:
        name: in words.
        unit: of the figures, as they are shown.
        paired: by what.
        pick: the difference.
        form, brief, tick: of a figure in full, beside a row of a chart, and on its axis.
        better: which way is better, in words.
    """

    name: str
    unit: str
    paired: str
    pick: Callable[[Difference], Estimate | None]
    form: Format
    brief: Format
    tick: Format
    better: str = ""


def _whole_points(share: float) -> str:
    return numbers.points(share, 0)


_MEASURES = (
    _Measure(
        "accuracy",
        "points",
        "question",
        lambda known: known.accuracy,
        numbers.points,
        _whole_points,
        _whole_points,
    ),
    _Measure(
        "log-perplexity",
        "nats per token",
        "record",
        lambda known: known.log_perplexity,
        numbers.signed,
        numbers.signed,
        numbers.tick,
        " Less than zero is better.",
    ),
)


def _known(evidence: Evidence, measure: _Measure) -> list[tuple[Difference, Estimate]]:
    return [(known, found) for known in _pooled_first(evidence) if (found := measure.pick(known)) is not None]


def _difference_plot(evidence: Evidence, measure: _Measure) -> Html:
    groups: dict[str, list[Row]] = {}
    for known, found in _known(evidence, measure):
        if known.held_out != POOLED and known.held_out not in evidence.clients[:MOST]:
            continue
        ends = numbers.interval(found, measure.brief)
        shown = measure.brief(found.value) + (f" ({ends})" if ends else "")
        words = numbers.evidence(found, measure.form)
        tip = f"{_named(evidence, known)}, on {known.held_out}\n{measure.form(found.value)} {measure.unit}, {words}"
        color = look(evidence, known.model)
        row = Row(known.model, known.held_out, color, found.value, shown, tip, found.low, found.high)
        groups.setdefault(_named(evidence, known), []).append(row)
    if not groups:
        return Html("")
    axis = Axis(f"difference, {measure.unit}", form=measure.tick, reference=0.0)
    note = (
        f"Paired by {measure.paired}, with 95 % intervals. An interval that covers the strong line shows no difference."
    )
    return figure(
        f"Differences of {measure.name}",
        interval_plot(f"Differences of {measure.name} in {measure.unit}", list(groups.items()), axis),
        note=note + measure.better,
    )


def _side_by_side(evidence: Evidence, caption: str, pick: Pick, form: Format, ends: Format) -> Html:
    columns = [c for c in _columns(evidence) if any(c[2](h, pick) for h in [POOLED, *evidence.clients])]
    if not columns:
        return Html("")
    rows: Rows = [
        [held_out, *(cell(figure_of(held_out, pick), form, ends) for *_, figure_of in columns)]
        for held_out in [POOLED, *evidence.clients]
    ]
    return table(caption, ["Held-out set", *(name for _, name, _ in columns)], rows)


def _by_kind(evidence: Evidence) -> Html:
    rows = [row for row in evidence.utility.rows if row.by_kind] if evidence.utility else []
    pooled = [row for row in rows if row.held_out == POOLED and row.member is None]
    kinds = list(dict.fromkeys(kind for row in pooled for kind in row.by_kind))
    if not kinds:
        return Html("")
    body: Rows = [
        [kind, *(cell(row.by_kind.get(kind), numbers.percent, numbers.hundredths) for row in pooled)] for kind in kinds
    ]
    caption = "Accuracy by kind of question, pooled (95 % interval)"
    return table(caption, ["Kind", *(titled(row.model) for row in pooled)], body)


def _everything(evidence: Evidence) -> Html:
    rows = evidence.utility.rows if evidence.utility else ()
    caption = "Every model on every held-out set"
    if len(rows) > MOST_ROWS:
        rows = tuple(row for row in rows if row.member is None or row.held_out in (row.member, POOLED))
        caption += "; personal models on the pooled and their own set, the rest is in results/utility.json"
    body: Rows = []
    for row in rows:
        shared = row.held_out == POOLED and row.member is None  # its kinds have their own table
        kinds = {} if shared else {f"{row.held_out}, {kind}": share for kind, share in row.by_kind.items()}
        for held_out, accuracy in ({row.held_out: row.accuracy} | kinds).items():
            body.append(
                [
                    titled(row.model) + (f" of {row.member}" if row.member else ""),
                    held_out,
                    cell(accuracy, numbers.percent, numbers.hundredths),
                    cell(None if held_out in kinds else row.perplexity, numbers.number, numbers.number),
                ]
            )
    whole = table(caption, ["Model", "Held-out set", "Accuracy", "Perplexity"], body)
    return details(f"All measurements ({numbers.counted(len(body), 'row')})", whole)


def _differences(evidence: Evidence, measure: _Measure) -> Html:
    body: Rows = [
        [
            _named(evidence, known),
            known.held_out,
            Cell(measure.form(found.value), value=found.value),
            Cell(numbers.interval(found, measure.form) or numbers.NONE, value=found.low),
            Cell(numbers.count(found.n), value=found.n),
        ]
        for known, found in _known(evidence, measure)
    ]
    if not body:
        return Html("")
    head = ["Difference", "Held-out set", measure.unit.capitalize(), "95 % interval", "n"]
    whole = table(f"Differences of {measure.name}, paired by {measure.paired}", head, body)
    return details(f"Differences of {measure.name} in figures ({numbers.counted(len(body), 'row')})", whole)


def utility(evidence: Evidence) -> Html:
    """The section."""
    if evidence.utility is None or not evidence.utility.rows:
        return section("utility", "What the models can do", paragraph("Not measured yet.", class_="missing"))
    intro = "Each model is asked about records that no client trained on. "
    if evidence.personal:
        intro += (
            "Where members train alone, each has a personal model: the tables give a member’s own model on its own "
        )
        intro += "held-out set, and the mean of all members’ models on each set."
    shares = (numbers.percent, numbers.hundredths)
    plots = (_difference_plot(evidence, measure) for measure in _MEASURES)
    return section(
        "utility",
        "What the models can do",
        paragraph(intro),
        tag("div", _accuracy_plot(evidence), *plots, class_="charts"),
        _side_by_side(evidence, "Accuracy on held-out questions (95 % interval; n questions)", _accuracy, *shares),
        _side_by_side(
            evidence,
            "Perplexity of held-out responses (95 % interval; n tokens); lower is better",
            _perplexity,
            numbers.number,
            numbers.number,
        ),
        _by_kind(evidence),
        *(_differences(evidence, measure) for measure in _MEASURES),
        _everything(evidence),
    )
