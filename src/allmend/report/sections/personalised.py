"""Whether working together paid: every arm on each client's own held-out records, beside training alone."""

import math
from collections.abc import Mapping

from allmend.report import numbers
from allmend.report.charts import Axis, Row, interval_plot
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, figure, listed, paragraph, section, table, tag
from allmend.report.sections.utility import look, titled
from allmend.results import BASE, Estimate, PersonalisedMember, PersonalisedTable

MOST = 40
"""Clients that the chart has room for."""

ALIKE = 1.05
"""Times as many parameters that still count as equally many: a mixture has routers beside its experts."""


def personalised(evidence: Evidence) -> Html:
    """The section; nothing where no arm has personal models."""
    found = evidence.personalised
    if found is None or not found.members:
        return Html("")
    intro = (
        "Each client’s own held-out records, under its own model in each arm, or under the model that an arm has for "
        "all. A client had better train alone where that serves these records as well."
    )
    return section(
        "personalised",
        "Did working together pay?",
        paragraph(intro),
        paragraph(tag("strong", in_words(found))) if found.against else None,
        _chart(evidence, found),
        *_tables(found),
        listed(notes_of(found)),
    )


def _tables(found: PersonalisedTable) -> list[Html]:
    """Arms, and then clients under each of them."""
    asked = [question(found)] if found.against else []
    head, rows = arm_table(found)
    over = "mean over clients (95 % interval)"
    if "Down" in head:
        over += "; for a client, bytes from the coordinator (down) and to it (up), optimiser steps and passes"
    return [
        table(f"Loss per token (nats), {over}", head, rows),
        table(
            "Loss per token (nats) on each client’s own records, the lowest in bold",
            ["Client", *asked, *(titled(arm.arm) for arm in found.arms)],
            [
                [row.member, *([paid_in_words(row, found)] if asked else []), *_losses(row, found)]
                for row in found.members
            ],
        ),
    ]


def question(found: PersonalisedTable) -> str:
    """What the comparison with an arm, or with the base model, answers for a client."""
    return "Better than the base model?" if found.against == BASE else "Did it pay?"


def in_words(found: PersonalisedTable) -> str:
    """For how many clients it paid, in a sentence."""
    answers = [row.paid for row in found.members]
    better = numbers.out_of(answers.count(True), len(answers))
    words = f"Working together is shown to be better than {found.against} for {better} clients"
    words += f", and worse for {answers.count(False)}" if answers.count(False) else ""
    unclear = answers.count(None)
    return words + (f"; for {unclear} it cannot be told." if unclear else ".")


def paid_in_words(row: PersonalisedMember, found: PersonalisedTable) -> str:
    """Whether it paid for a client, and how far that is known."""
    if row.together is None or row.difference is None:
        return "cannot be told: in no other arm do clients work together"
    gap = row.difference
    shown = numbers.thousandths(abs(gap.value))
    ends = sorted(abs(end) for end in (gap.low, gap.high) if end is not None)
    behind = f" ({' to '.join(map(numbers.thousandths, ends))})" if ends else ""
    if row.paid is None:
        known = numbers.interval(gap, numbers.signed_thousandths)
        minus = f"{row.together} minus {titled(str(found.against))} is {numbers.signed_thousandths(gap.value)}"
        return f"cannot be told: {minus}" + (f" ({known})" if known else "")
    if found.against == BASE:
        words = "yes, by" if row.paid else "no, worse by"
        return f"{words} {shown}{behind}, with {row.together}"
    if row.paid:
        if row.best == BASE:
            return f"yes, by {shown}{behind}, with {row.together}; but the base model is lower still"
        alone = [arm.arm for arm in found.arms if arm.alone and arm.arm == row.best]
        but = f"; but {alone[0]}, in which clients train alone, is lower still" if alone else ""
        return f"yes, by {shown}{behind}, with {row.together}{but}"
    return f"no: {found.against} is better by {shown}{behind} than {row.together}"


def arm_table(found: PersonalisedTable) -> tuple[list[str], Rows]:
    """Heads and a row for each arm: loss, perplexity, difference, regret, bytes down and up, steps and passes.

    Where arms are compared with none there is no difference, and where no bytes are known none are shown.
    """
    minus = f"Minus {titled(str(found.against))}"
    several = len(found.members) > 1
    head = [
        "Arm",
        "Loss",
        "Perplexity",
        minus,
        "Worst regret" if several else "Regret",
        "Down",
        "Up",
        "Steps",
        "Passes",
    ]
    absent = set() if found.against else {minus}
    if not any(arm.sent or arm.received for arm in found.arms):
        absent |= {"Down", "Up"}
    rows: Rows = []
    for arm in found.arms:
        difference = Cell(numbers.NONE)
        if arm.difference is not None:
            shown = numbers.signed_thousandths(arm.difference.value)
            ends = numbers.interval(arm.difference, numbers.signed_thousandths)
            difference = Cell(shown, ends, arm.difference.value)
        rows.append(
            [
                titled(arm.arm),
                Cell(numbers.thousandths(arm.loss.value), value=arm.loss.value),
                Cell(numbers.number(math.exp(min(arm.loss.value, 700.0))), value=arm.loss.value),
                difference,
                Cell(numbers.thousandths(arm.regret), arm.regretting if arm.regret and several else "", arm.regret),
                Cell(numbers.size(arm.sent), value=arm.sent),
                Cell(numbers.size(arm.received), value=arm.received),
                _spread(arm.steps, numbers.count),
                _spread(arm.passes, lambda passes: f"{passes:.1f}"),
            ]
        )
    places = [place for place, name in enumerate(head) if name not in absent]
    return [head[place] for place in places], [[row[place] for place in places] for row in rows]


def _spread(by_party: Mapping[str, float], form: numbers.Format) -> Cell:
    """One figure where all have it, else the least and the most."""
    if not by_party:
        return Cell(numbers.NONE)
    least, most = form(min(by_party.values())), form(max(by_party.values()))
    return Cell(least if least == most else f"{least}–{most}", value=max(by_party.values()))


def _losses(row: PersonalisedMember, found: PersonalisedTable) -> list[str | Cell]:
    cells: list[str | Cell] = []
    for arm in found.arms:
        loss = row.losses[arm.arm].value
        shown = numbers.thousandths(loss)
        cells.append(Cell(tag("strong", shown) if arm.arm == row.best else shown, value=loss))
    return cells


def notes_of(found: PersonalisedTable) -> list[str]:
    """What to take with care."""
    notes = []
    if found.against is None:
        notes.append(
            "No finished arm trains alone, so that it cannot be told for whom working together paid: add one with the "
            "strategy local, or compare with another arm (allmend personalise compare --against ARM)."
        )
    if found.against == BASE:
        notes.append(
            "No arm trains alone, so that it cannot be told whether working together paid: the base model has learnt "
            "from nobody’s records. An arm with the strategy local in the recipe would tell."
        )
    reference = next((arm for arm in found.arms if arm.arm == found.against), found.arms[0])
    known = [arm for arm in found.arms if arm.steps and not arm.simulated] if reference.steps else []
    if other := [arm for arm in known if arm.steps != reference.steps]:
        named = ", ".join(f"{arm.arm} ({_spread(arm.steps, numbers.count).shown})" for arm in other)
        notes.append(
            f"Not at equal steps: clients’ models take {_spread(reference.steps, numbers.count).shown} steps in "
            f"{reference.arm}, and others in {named}."
        )
    sizes: dict[int, list[str]] = {}
    for arm in found.arms:
        if arm.trainable:
            sizes.setdefault(arm.trainable, []).append(arm.arm)
    if sizes and max(sizes) > ALIKE * min(sizes):
        named = "; ".join(f"{numbers.count(size)} in {', '.join(names)}" for size, names in sizes.items())
        notes.append(
            f"Not with equally many parameters that learn: {named}. Between arms of different size it is not working "
            "together alone that makes the difference."
        )
    if pooled := [arm.arm for arm in found.arms if arm.simulated]:
        notes.append(f"{', '.join(pooled)}: one party with all records takes the steps of all. No client can have it.")
    together = [arm for arm in found.arms if not arm.alone and not arm.simulated and arm.arm != found.against]
    if found.against and len(together) > 1:
        notes.append(
            f"Whether it paid is asked of the lowest of {len(together)} arms for each client; its interval is wider, "
            "to allow for that choice. Intervals do not cover other training seeds."
        )
    worst = ", for the client where it is largest" if len(found.members) > 1 else ""
    notes.append(
        f"Regret is a client’s loss above that of its best arm{worst}. Passes are over a client’s training records, "
        "with what its strategy does beside the steps."
    )
    if found.left_out:
        notes.append(f"Without held-out records, or without a model in every arm: {', '.join(found.left_out)}.")
    if found.unfinished:
        notes.append(f"Not finished yet: {', '.join(found.unfinished)}.")
    return notes


def _chart(evidence: Evidence, found: PersonalisedTable) -> Html | None:
    """Each client's difference, on one axis."""
    known = [(row, row.difference) for row in found.members if row.difference is not None and row.together is not None]
    if not known:
        return None
    rows = [_bar(evidence, row, difference) for row, difference in known[:MOST]]
    title = f"Best arm together minus {found.against}, by client"
    note = "Nats per token, paired by record. Left of the strong line, working together is better."
    if len(known) > MOST:
        note += f" {len(known) - MOST} more clients are in the table."
    axis = Axis("difference of loss, nats per token", form=numbers.tick, reference=0.0)
    return tag("div", figure(title, interval_plot(title, [("", rows)], axis), note=note), class_="charts")


def _bar(evidence: Evidence, row: PersonalisedMember, difference: Estimate) -> Row:
    arm = str(row.together)
    ends = numbers.interval(difference, numbers.signed_thousandths)
    shown = numbers.signed_thousandths(difference.value)
    tip = f"{row.member}: {arm}\n{shown}{f' ({ends})' if ends else ''} nats per token"
    color = look(evidence, arm)
    return Row(arm, row.member, color, difference.value, f"{shown} {arm}", tip, difference.low, difference.high)
