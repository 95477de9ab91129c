"""Members' own models: what each keeps of its member's canaries, and what it shows of the other members'."""

from collections.abc import Callable, Iterator, Sequence

from allmend.report import numbers
from allmend.report.base_rate import Verdict, hits, outcomes
from allmend.report.charts import Axis, Row, interval_plot
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, figure, in_figures, join, paragraph, table, tag
from allmend.report.numbers import Format
from allmend.report.sections.answer import MOST_NAMED, badge
from allmend.report.sections.extraction import copies_of
from allmend.report.sections.utility import cell, look
from allmend.results import (
    AuditTable,
    Estimate,
    KeptByMembers,
    LikelihoodGap,
    OverMembers,
    Whose,
    longest_prefix,
    member_of,
)

TITLES: dict[Whose, str] = {"own": "own", "others": "others’"}
MOST_ROWS = 300
"""Rows of the table by model; beyond, it is left to the file."""


def _named(models: Sequence[str]) -> str:
    names = ", ".join(member_of(model)[1] or "" for model in models[:MOST_NAMED])
    return names + (f" and {len(models) - MOST_NAMED} more" if len(models) > MOST_NAMED else "")


def _recited(audit: AuditTable, models: Sequence[str], whose: Whose) -> str:
    """How many canaries come out of how many models' answers, planted and controls."""
    found = [one for model in models for one in outcomes(audit.of(whose, model), model)]
    if not found:
        return ""
    planted = numbers.out_of(*hits(one.planted.exact for one in found))
    controls = [one.control.exact for one in found if one.control]
    return f"{planted} planted" + (f", {numbers.out_of(*hits(controls))} controls" if controls else "")


def _answer(audit: AuditTable, arm: str) -> Html:
    """Whether what one member's data taught shows in another's model, in a sentence."""
    tests = [test for test in audit.ranks if member_of(test.model)[0] == arm and test.whose == "others"]
    models = list(dict.fromkeys(test.model for test in tests))
    above = [test for test in audit.above_chance("others") if test in tests]
    passed = list(dict.fromkeys(test.model for test in above))
    if not tests:
        words = ": there are no canaries of other members to ask for."
    elif passed:
        words = f": in {len(passed)} of {len(models)} members’ models, planted canaries of other members rank above "
        words += f"controls beyond chance ({_named(passed)}; p ≤ {numbers.chance(max(test.p for test in above))} each)."
    else:
        words = (
            f": none of {len(models)} members’ models is shown to know another member’s planted canaries (least p of "
        )
        words += f"{numbers.counted(len(tests), 'test')}: {numbers.chance(min(test.p for test in tests))})."
    if recited := _recited(audit, models, "others"):
        words += f" They recite {recited} of others."
    own = [row for row in audit.members if (row.arm, row.whose) == (arm, "own")]
    most = max(own, key=lambda row: row.copies, default=None)
    if most is not None and most.gap is not None:
        words += (
            f" Own canaries with {copies_of(most.copies)} are {numbers.signed(most.gap.mean.value)} nats per token "
        )
        words += f"likelier than controls; {_recited(audit, models, 'own') or 'none'} are recited."
    sign = badge(Verdict.MEMORISED if passed else Verdict.NOTHING, "passed on" if passed else "nothing shown to pass")
    return tag("li", sign, paragraph(tag("strong", arm), words))


def _chart(evidence: Evidence, audit: AuditTable, copies: int) -> Html:
    groups = []
    for arm in dict.fromkeys(row.arm for row in audit.members):
        lines = []
        for row in (row for row in audit.members if (row.arm, row.copies) == (arm, copies)):
            if (gap := row.gap) is None:
                continue
            ends = numbers.interval(gap.mean, numbers.number)
            shown = numbers.signed(gap.mean.value) + (f" ({ends})" if ends else "")
            name = f"{TITLES[row.whose]} canaries"
            tip = f"{arm}, {name}\n{numbers.signed(gap.mean.value)} nats per token, mean over "
            tip += f"{numbers.counted(gap.mean.n, 'member')}; {numbers.signed(gap.least)} to {numbers.signed(gap.most)}"
            lines.append(Row(arm, name, look(evidence, arm), gap.mean.value, shown, tip, gap.mean.low, gap.mean.high))
        groups.append((arm, lines))
    axis = Axis("log-likelihood over controls, nats per token", reference=0.0)
    return figure(
        f"Likelihood gap in members’ own models, {copies_of(copies)}",
        interval_plot("Likelihood gap in members’ own models", groups, axis),
        note="Mean over members, with 95 % intervals over members. Others’ canaries are likelier than their controls "
        "where something passed between members; those that train alone show what chance does.",
    )


def _over(found: OverMembers | None, form: Format, *, beside: str = "") -> Cell:
    if found is None:
        return Cell(numbers.NONE)
    span = f"{form(found.least)} to {form(found.most)}" if found.least < found.most else ""
    return Cell(form(found.mean.value), "; ".join(filter(None, (span, beside))), found.mean.value)


def _whole(share: float) -> str:
    return numbers.percent(share, 0)


def _arms(audit: AuditTable) -> Html:
    """A row for an arm's members and number of copies, own canaries beside those of others."""
    known = {(row.arm, row.copies, row.whose): row for row in audit.members}

    def recited(row: KeptByMembers) -> Cell:
        null = row.exact_controls
        return _over(row.exact, _whole, beside="" if null is None else f"controls {_whole(null.mean.value)}")

    figures: tuple[Callable[[KeptByMembers], Cell], ...] = (
        lambda row: _over(row.gap, numbers.signed),
        recited,
        lambda row: _over(row.exposure, numbers.number),
        lambda row: _over(row.auc, numbers.number),
    )

    def line(arm: str, copies: int) -> list[str | Cell]:
        rows = [known.get((arm, copies, whose)) for whose in TITLES]
        shown = [Cell(numbers.NONE) if row is None else of(row) for of in figures for row in rows]
        return [arm, Cell(numbers.count(copies), value=copies), *shown]

    names = ("Gap, nats", "Recited", "Exposure, bits", "AUC")
    head = ["Arm", "Copies", *(words for name in names for words in (f"{name}: own", TITLES["others"]))]
    caption = "Members’ own models: mean over members, and from the least to the most"
    arms = dict.fromkeys(row.arm for row in audit.members)
    every = sorted({row.copies for row in audit.members})
    return table(caption, head, [line(arm, copies) for arm in arms for copies in every])


def _models(audit: AuditTable) -> Html:
    """Every model by itself."""
    tests = {(test.model, test.whose, test.copies): test.p for test in audit.ranks}
    above = {(test.model, test.whose, test.copies) for whose in TITLES for test in audit.above_chance(whose)}
    exact = _exact(audit)
    auc: dict[tuple[str, Whose | None, int], Estimate] = {
        (row.model, row.whose, row.copies): row.auc
        for row in audit.membership
        if row.whose is not None and row.score == "ratio" and row.copies is not None
    }

    def line(gap: LikelihoodGap) -> list[str | Cell]:
        key = (gap.model, gap.whose, gap.copies)
        p = tests.get((gap.model, gap.whose, gap.copies)) if gap.whose else None
        sign = "▲ above chance" if key in above else ""
        return [
            gap.model,
            TITLES[gap.whose] if gap.whose else "",
            Cell(numbers.count(gap.copies), value=gap.copies),
            cell(gap.gap, numbers.signed, numbers.number),
            exact(*key, True),
            exact(*key, False),
            cell(auc.get(key), numbers.number, numbers.number),
            Cell(numbers.NONE) if p is None else Cell(numbers.chance(p), sign, p),
        ]

    rows: Rows = [line(gap) for gap in audit.gaps if gap.whose is not None]
    head = ["Model", "Canaries", "Copies", "Gap, nats", "Recited: planted", "controls", "AUC", "p"]
    caption = "Each member’s own model (95 % interval; n canaries; p of the planted canaries’ ranks among the controls)"
    if len(rows) > MOST_ROWS:
        rows = rows[:MOST_ROWS]
        caption += f"; the first {MOST_ROWS}, the rest is in results/audit.json"
    return in_figures(table(caption, head, rows), len(rows))


def _records(audit: AuditTable) -> Html:
    """Whether each model tells records that were trained on from those held out."""
    rows: Rows = [
        [
            row.model,
            TITLES[row.whose],
            row.records,
            cell(row.auc, numbers.number, numbers.number),
        ]
        for row in audit.membership
        if row.whose is not None and row.copies is None and row.score == "ratio"
    ]
    if not rows:
        return Html("")
    caption = "Training records told from held-out ones, by loss over the base model’s (95 % interval; n records)"
    if len(rows) > MOST_ROWS:
        rows = rows[:MOST_ROWS]
        caption += f"; the first {MOST_ROWS}, the rest is in results/audit.json"
    return in_figures(table(caption, ["Model", "Whose", "Records", "AUC"], rows), len(rows))


def _exact(audit: AuditTable) -> Callable[[str, Whose | None, int, bool], str | Cell]:
    prefix = longest_prefix(row for row in audit.extraction if row.whose is not None)
    known = {(row.model, row.whose, row.copies, row.inserted): row for row in audit.extraction if row.prefix == prefix}

    def counted(model: str, whose: Whose | None, copies: int, inserted: bool) -> str | Cell:
        row = known.get((model, whose, copies, inserted))
        return Cell(numbers.NONE) if row is None else Cell(numbers.out_of(*hits([row.exact])), "", row.exact.value)

    return counted


def members_models(evidence: Evidence) -> list[Html]:
    """What members leave with, where it was audited; nothing where it was not."""
    audit = evidence.members_audit
    if audit is None:
        return []
    return list(_shown(evidence, audit))


def _shown(evidence: Evidence, audit: AuditTable) -> Iterator[Html]:
    arms = list(dict.fromkeys(member_of(test.model)[0] for test in audit.ranks))
    yield tag("h3", "What members’ own models keep, and what passed between members")
    yield tag("ul", *(_answer(audit, arm) for arm in arms), class_="answers")
    if audit.members:
        yield _chart(evidence, audit, max(row.copies for row in audit.members))
        yield join([_arms(audit), _models(audit)])
    yield _records(audit)
