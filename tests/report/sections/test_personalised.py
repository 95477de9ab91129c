"""Did working together pay: the section and its card, from tables that are made up."""

from pathlib import Path

import pytest

from allmend.events import ArmStarted
from allmend.report.evidence import Evidence
from allmend.report.findings.usefulness import paid
from allmend.report.sections.personalised import arm_table, notes_of, paid_in_words, personalised, question
from allmend.results import BASE, Estimate, PersonalisedArm, PersonalisedMember, PersonalisedTable


def loss(value: float) -> Estimate:
    return Estimate(value=value, n=100)


def gap(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=100)


def made(*, against: str | None = "local") -> PersonalisedTable:
    arms = (
        PersonalisedArm(
            arm="cobo",
            strategy="cobo",
            loss=loss(2.0),
            difference=gap(-0.3, 0.1) if against else None,
            regret=0.2,
            regretting="<b>",
            steps={"a": 4, "<b>": 6},
            passes={"a": 1.0, "<b>": 1.0},
        ),
        PersonalisedArm(arm="local", strategy="local", alone=True, loss=loss(2.3), regret=0.8, regretting="a"),
    )
    members = (
        PersonalisedMember(
            member="a",
            losses={"cobo": loss(2.0), "local": loss(2.8)},
            best="cobo",
            together="cobo",
            difference=gap(-0.8, 0.1) if against else None,
        ),
        PersonalisedMember(
            member="<b>",
            losses={"cobo": loss(2.0), "local": loss(1.8)},
            best="local",
            together="cobo",
            difference=gap(0.2, 0.3) if against else None,
        ),
    )
    return PersonalisedTable(against=against, arms=arms, members=members)


def evidence(table: PersonalisedTable | None) -> Evidence:
    arms = {name: ArmStarted(arm=name, strategy=name, round=1, rounds=1, trainable=1) for name in ("cobo", "local")}
    return Evidence(Path("run"), arms=arms, personalised=table)


def test_there_is_no_section_where_no_arm_has_personal_models() -> None:
    assert personalised(evidence(None)) == ""
    assert paid(evidence(None)) is None


def test_the_best_is_in_bold_and_names_are_escaped() -> None:
    page = personalised(evidence(made()))
    assert "<strong>2.000</strong>" in page
    assert "<strong>1.800</strong>" in page
    assert page.count("<strong>") == 2 + 1 + 1  # the sentence, and the chart's title
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_without_an_arm_to_compare_with_there_are_no_differences_and_no_verdict() -> None:
    page = personalised(evidence(made(against=None)))
    assert "Minus" not in page
    assert "Did it pay?" not in page
    assert "<figure" not in page
    assert "No finished arm trains alone" in page
    assert paid(evidence(made(against=None))) is None


def test_the_card_counts_who_is_better_off() -> None:
    card = paid(evidence(made()))
    assert card is not None
    assert card.figure == "1 of 2"
    assert "for 1 it cannot be told" in card.sentence
    assert "cobo is best among these arms (−0.30 nats per token" in card.sentence


def test_figures_that_parties_share_stand_once_and_others_as_a_span() -> None:
    first, second = ([getattr(cell, "shown", cell) for cell in row] for row in arm_table(made())[1])
    assert first[-2:] == ["4–6", "1.0"]
    assert second[-2:] == ["–", "–"]
    assert second[3] == "–"


@pytest.mark.parametrize(
    ("value", "half", "words"),
    [
        (-0.8, 0.1, "yes, by 0.800 (0.700 to 0.900), with cobo"),
        (0.8, 0.1, "no, worse by 0.800 (0.700 to 0.900), with cobo"),
        (-0.8, 1.0, "cannot be told: cobo minus base model is −0.800 (−1.800 to +0.200)"),
    ],
)
def test_beside_the_base_model_it_is_not_said_that_working_together_paid(value: float, half: float, words: str) -> None:
    known = made()
    base = known.arms[1].model_copy(update={"arm": BASE, "strategy": BASE})
    row = known.members[0].model_copy(
        update={"losses": {"cobo": loss(2.0), BASE: loss(2.8)}, "difference": gap(value, half)}
    )
    table = PersonalisedTable(against=BASE, arms=(known.arms[0], base), members=(row,))
    assert paid_in_words(row, table) == words
    assert question(table) == "Better than the base model?" != question(known)
    assert "it cannot be told whether working together paid" in notes_of(table)[0]
    assert not any("it cannot be told whether" in note for note in notes_of(known))
    head, rows = arm_table(table)
    assert head[3] == "Minus base model"
    assert [one[0] for one in rows] == ["cobo", "base model"]


def test_a_base_model_that_is_lower_still_is_named() -> None:
    row = made().members[0].model_copy(update={"losses": {BASE: loss(1.0)}, "best": BASE})
    assert paid_in_words(row, made()).endswith("with cobo; but the base model is lower still")


def test_bytes_that_are_not_known_are_not_shown_as_none() -> None:
    assert not {"Down", "Up"} & {*arm_table(made())[0]}
    known = made()
    arms = (known.arms[0].model_copy(update={"sent": 2048.0, "received": 1024.0}), known.arms[1])
    head, rows = arm_table(known.model_copy(update={"arms": arms}))
    cells = dict(zip(head, rows[0], strict=True))
    assert (getattr(cells["Down"], "value", 0), getattr(cells["Up"], "value", 0)) == (2048, 1024)
    assert len(head) == len(rows[0]) == 9


@pytest.mark.parametrize(("value", "half", "answer"), [(-0.2, 0.1, True), (0.2, 0.1, False), (-0.2, 0.3, None)])
def test_it_paid_where_the_interval_lies_below_zero(value: float, half: float, answer: bool | None) -> None:
    row = PersonalisedMember(member="a", losses={}, best="cobo", together="cobo", difference=gap(value, half))
    assert row.paid is answer
    assert row.model_copy(update={"difference": loss(value)}).paid is None
