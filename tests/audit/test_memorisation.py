"""The audit of one model: every measure is there, with its controls, and depends on nothing that it should not."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.audit.epsilon import epsilon_bound
from allmend.audit.memorisation import Findings, RecordGroup, audit_model, tokens_to_read
from allmend.data.canaries import Canary, plant
from allmend.data.canary_kinds import KINDS
from allmend.data.chat import Encoder
from allmend.data.records import Message, Record
from allmend.errors import UserError
from allmend.recipe import Audit

PREFIXES = [4, 12, 20]
TABLES = ("extraction", "discoverable", "gaps", "exposure", "membership", "epsilon")

Models = dict[str, LlamaForCausalLM]


def audit(
    model: LlamaForCausalLM,
    encoder: Encoder,
    canaries: Sequence[Canary],
    prefixes: list[int] | None = None,
    **more: Any,
) -> Findings:
    settings = Audit(prefix_tokens=prefixes or PREFIXES, draws=[1, 100])
    return audit_model("arm", model, encoder, canaries, settings, **{"seed": 0} | more)


def figures(findings: Findings) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every row of every table: what it is about, and its numbers."""
    rows = []
    for table in TABLES:
        for row in getattr(findings, table):
            plain = row.model_dump()
            about = {name: value for name, value in plain.items() if not isinstance(value, dict | float)}
            rows.append((about | {"table": table}, {name: plain[name] for name in plain if name not in about}))
    return rows


def close(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[key], second[key]) for key in first)
    return first == second or bool(first == pytest.approx(second, abs=1e-5, rel=1e-5))


def test_what_is_known_by_heart_is_extracted_and_no_control_is(
    models: Models, encoder: Encoder, canaries: list[Canary]
) -> None:
    found = audit(models["by heart"], encoder, canaries)
    assert len(found.extraction) == 2 * 2 * len(PREFIXES)  # copies, groups, prefixes
    for row in found.extraction:
        assert row.model == "arm"
        assert (row.exact.value, row.approximate.value >= row.exact.value) == (float(row.inserted), True)
    assert all(gap.gap.value > 1 for gap in found.gaps)
    assert {(row.copies, row.auc.value) for row in found.membership if row.score == "loss"} == {(1, 1.0), (3, 1.0)}
    for drawn in found.discoverable:
        assert (drawn.likely.value == 1.0) == drawn.inserted
    assert found.skipped == 0


def test_an_untouched_model_gives_nothing_away(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    found = audit(models["untouched"], encoder, canaries)
    for row in found.extraction:
        assert row.exact.value == 0
        assert row.exact.high is not None
        assert row.exact.high > 0.5  # a handful of canaries excludes little
    assert [bound.epsilon for bound in found.epsilon] == [0, 0, 0]


def test_the_order_of_canaries_does_not_matter(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    shuffled = list(canaries)
    random.Random(1).shuffle(shuffled)
    base = [audit(models["untouched"], encoder, order) for order in (canaries, shuffled)]
    one, other = (
        audit(models["halfway"], encoder, order, reference=reference)
        for order, reference in zip((canaries, shuffled), base, strict=True)
    )
    assert len(figures(one)) > 40
    for (about, left), (same, right) in zip(figures(one), figures(other), strict=True):
        assert about == same
        assert close(left, right), about
    probes = [sorted(found.probes, key=lambda probe: (probe.prefix, probe.canary)) for found in (one, other)]
    for left, right in zip(*probes, strict=True):
        for field in fields(left):
            assert close(getattr(left, field.name), getattr(right, field.name))
    assert one.identifiers == other.identifiers


def test_a_probe_is_a_canary_and_a_prefix(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    found = audit(models["halfway"], encoder, canaries)
    assert {(probe.canary, probe.prefix_tokens) for probe in found.probes} == {
        (canary.id, prefix) for canary in canaries for prefix in PREFIXES
    }
    assert len(found.probes) == len(canaries) * len(PREFIXES)
    by_id = {canary.id: canary for canary in canaries}
    readings = dict(zip(by_id, found.readings, strict=True))
    for probe in found.probes:
        canary = by_id[probe.canary]
        assert (probe.kind, probe.client, probe.copies, probe.inserted) == (
            canary.kind, canary.client, canary.copies, canary.inserted,
        )  # fmt: skip
        assert probe.log_likelihood == pytest.approx(readings[canary.id].log_likelihood.mean().item())
        assert probe.exact == (probe.matched == 1)
        assert probe.bleu >= probe.exact
    for row in found.extraction:
        cell = [p for p in found.probes if (p.prefix, p.copies, p.inserted) == (row.prefix, row.copies, row.inserted)]
        assert row.exact.value == sum(p.exact for p in cell) / len(cell)
        assert row.matched.value == pytest.approx(sum(p.matched for p in cell) / len(cell))


def test_prefixes_that_leave_nothing_are_counted(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    lengths = [len(canary.text) for canary in canaries]  # bytes are tokens
    for prefix in (min(lengths) - 1, min(lengths), max(lengths) - 1, max(lengths), 500):
        found = audit(models["untouched"], encoder, canaries, [prefix])
        assert found.skipped == sum(length <= prefix for length in lengths)
        assert sum(row.exact.n for row in found.extraction) == len(canaries) - found.skipped == len(found.probes)
    assert found.extraction == ()
    assert found.gaps


def test_a_prefix_named_twice_counts_once(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    one = audit(models["untouched"], encoder, canaries, [12, 500, 4])
    again = audit(models["untouched"], encoder, canaries, [4, 12, 12, 500, 500])
    assert figures(again) == figures(one)
    assert again.skipped == one.skipped
    assert [row.prefix_tokens for row in one.extraction] == [4] * 4 + [12] * 4


def test_shares_are_prefixes_too(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    settings = Audit(prefix_tokens=[], prefix_shares=[0.5, 0.25])
    found = audit_model("arm", models["halfway"], encoder, canaries, settings, seed=0)
    assert [row.prefix for row in found.extraction] == ["25 %"] * 4 + ["50 %"] * 4
    assert {(probe.canary, probe.prefix_tokens) for probe in found.probes if probe.prefix == "50 %"} == {
        (canary.id, round(len(canary.text) / 2)) for canary in canaries
    }


@pytest.mark.parametrize("kept", [[True], [False], []])
def test_inserted_canaries_need_controls(
    tiny_model: LlamaForCausalLM, encoder: Encoder, canaries: list[Canary], kept: list[bool]
) -> None:
    with pytest.raises(UserError, match="one of the two is missing"):
        audit(tiny_model, encoder, [canary for canary in canaries if canary.inserted in kept])


# --- beside the base model


def test_the_base_model_is_the_reference_of_ratios(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    base = audit(models["untouched"], encoder, canaries)
    assert "ratio" not in {row.score for row in base.membership}
    assert {bound.score for bound in base.epsilon} == {"loss"}
    tuned = audit(models["by heart"], encoder, canaries, reference=base)
    assert {bound.score for bound in tuned.epsilon} == {"ratio"}
    assert {(row.copies, row.auc.value) for row in tuned.membership if row.score == "ratio"} == {(1, 1.0), (3, 1.0)}
    # a model is no likelier than itself: every score is 0, and no canary can be told from another
    itself = audit(models["untouched"], encoder, canaries, reference=base)
    assert {row.auc.value for row in itself.membership if row.score == "ratio"} == {0.5}
    assert {bound.right for bound in itself.epsilon} == {0}


def test_rates_that_need_more_controls_are_refused_once(
    models: Models, encoder: Encoder, canaries: list[Canary]
) -> None:
    base = audit(models["untouched"], encoder, canaries)
    for rate in ("1 %", "0.1 %"):
        assert sum(f"positive rate at {rate}" in reason for reason in base.refused) == 1
    assert audit(models["halfway"], encoder, canaries, reference=base).refused == ()
    assert all(row.tpr_at_1 is None for row in base.membership)


def test_a_cell_without_inserted_canaries_is_refused_and_the_others_are_not(
    models: Models, encoder: Encoder, canaries: list[Canary]
) -> None:
    one_cell_empty = [canary for canary in canaries if (canary.copies, canary.inserted) != (1, True)]
    found = audit(models["halfway"], encoder, one_cell_empty)
    assert {row.copies for row in found.membership} == {3}
    assert [gap.copies for gap in found.gaps] == [3]
    assert any("with 1 copies: none was inserted" in reason for reason in found.refused)
    no_control = [canary for canary in canaries if (canary.copies, canary.inserted) != (1, False)]
    found = audit(models["halfway"], encoder, no_control)
    assert [gap.copies for gap in found.gaps] == [3]
    assert {row.copies for row in found.membership} == {1, 3}  # against the controls of all
    assert any("gap of canaries with 1 copies: none of them is a control" in reason for reason in found.refused)


# --- ε


def test_the_bounds_are_those_of_the_scores(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    base = audit(models["untouched"], encoder, canaries)
    found = audit(models["halfway"], encoder, canaries, reference=base, delta=1e-3, accounted=7.0)
    gains = [
        (after.log_likelihood.mean() - before.log_likelihood.mean()).item()
        for after, before in zip(found.readings, base.readings, strict=True)
    ]
    assert [bound.copies for bound in found.epsilon] == [1, 3, None]
    for bound in found.epsilon:
        cell = [place for place, canary in enumerate(canaries) if bound.copies in (None, canary.copies)]
        expected = epsilon_bound(
            [gains[place] for place in cell],
            [canaries[place].inserted for place in cell],
            model="arm",
            copies=bound.copies,
            delta=1e-3,
            accounted=7.0 if bound.copies == 1 else None,  # which is about one record
        )
        assert bound == expected
    same = [replace(canary, copies=1) for canary in canaries]
    assert [bound.copies for bound in audit(models["untouched"], encoder, same).epsilon] == [1]


def test_canaries_that_were_never_drawn_count_in_the_bound_on_epsilon_alone(
    models: Models, encoder: Encoder, canaries: list[Canary]
) -> None:
    """Their coins belong to the design: without them, inserted canaries would be those that happened to be seen."""
    unseen = {canary.id for canary in canaries if canary.inserted and canary.copies == 1}
    found = audit(models["halfway"], encoder, canaries, unseen=unseen)
    whole = audit(models["halfway"], encoder, canaries)
    without = audit(models["halfway"], encoder, [canary for canary in canaries if canary.id not in unseen])
    assert found.epsilon == whole.epsilon
    assert not unseen & {probe.canary for probe in found.probes}
    for table in ("extraction", "discoverable", "gaps", "exposure", "membership"):
        about = [(a, f) for a, f in figures(found) if a["table"] == table]
        expected = [(a, f) for a, f in figures(without) if a["table"] == table]
        assert [a for a, _ in about] == [a for a, _ in expected]
        assert all(close(f, g) for (_, f), (_, g) in zip(about, expected, strict=True))
    assert any("planted canaries that Poisson sampling never drew (1)" in reason for reason in found.refused)


# --- clients' own records


def test_records_that_were_trained_on_are_told_from_those_that_were_not(
    models: Models, encoder: Encoder, canaries: list[Canary]
) -> None:
    """The texts that the model knows by heart, and others, as if they were a client's records."""
    members = [Record(canary.id, text=canary.text) for canary in canaries if canary.inserted]
    others = [Record(canary.id, text=canary.text) for canary in canaries if not canary.inserted]
    question = Record("q", messages=(Message("user", "Who?"), Message("assistant", "Ada.")))
    groups = [RecordGroup("north", members, others), RecordGroup("south", [question], [replace(question, id="r")])]
    base = audit(models["untouched"], encoder, canaries, groups=groups)
    found = audit(models["by heart"], encoder, canaries, groups=groups, reference=base)
    rows = {(row.records, row.score): row for row in found.membership if row.copies is None}
    assert {records for records, _ in rows} == {"records of north", "records of south"}
    for score in ("loss", "ratio"):
        assert rows["records of north", score].auc.value == 1.0
        assert rows["records of north", score].auc.n == 6
        assert rows["records of south", score].auc.value == 0.5  # the same record on both sides
    alone = audit(models["by heart"], encoder, canaries, reference=audit(models["untouched"], encoder, canaries))
    assert close(
        [f for a, f in figures(found) if a.get("records", "canaries") == "canaries"].__repr__(),
        [f for _, f in figures(alone)].__repr__(),
    )


# --- canaries of the generator, with secrets


@pytest.fixture(scope="module")
def planted() -> list[Canary]:
    return plant(clients=["a"], copies=[1, 3], per_cell=4, seed=1, kinds=["clinical-note"])


@pytest.fixture(scope="module")
def wide(tiny_tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tiny_tokenizer, "plain", 400)


def test_secrets_with_few_values_are_exposed_unless_others_are_named(
    tiny_model: LlamaForCausalLM, wide: Encoder, planted: list[Canary]
) -> None:
    slots = KINDS["clinical-note"].slots
    few = {slot for slot, values in slots.items() if values.size <= 400}
    assert 0 < len(few) < len(slots)

    def rows(exposure: list[str] | None) -> dict[str, int]:
        settings = Audit(prefix_tokens=[500], exposure=exposure)
        found = audit_model("arm", tiny_model, wide, planted, settings, seed=0).exposure
        for row in found:
            assert 0 <= row.exposure.value <= math.log2(row.values)
        return {row.slot: row.values for row in found}

    assert rows(None) == {slot: slots[slot].size for slot in few}
    one = min(few, key=lambda slot: slots[slot].size)
    assert rows([one]) == {one: slots[one].size}
    assert rows([]) == {}
    assert rows(["of another kind"]) == {}


def test_it_tells_how_far_it_is(
    tiny_model: LlamaForCausalLM, wide: Encoder, planted: list[Canary], make_trained: Callable[..., Any]
) -> None:
    """What is told on the way comes to what was announced, about, for the time left to mean something."""
    groups = [RecordGroup("a", [Record("r", text="some words")], [Record("s", text="others")])]
    cheap = min(KINDS["clinical-note"].slots, key=lambda slot: KINDS["clinical-note"].slots[slot].size)
    for settings in (Audit(prefix_tokens=[10, 40], exposure=[]), Audit(prefix_tokens=[100], exposure=[cheap])):
        told: list[int] = []
        audit_model("arm", tiny_model, wide, planted, settings, seed=0, groups=groups, on_tokens=told.append)
        assert all(tokens >= 0 for tokens in told)
        assert sum(told) == pytest.approx(tokens_to_read(planted, wide, settings, groups), rel=0.25)


def test_a_model_whose_weights_are_no_numbers_is_refused(
    make_tiny_model: Callable[..., LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    model = make_tiny_model()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"arm: .*log-likelihoods of the canaries are no finite numbers") as raised:
        audit(model, encoder, canaries)
    assert raised.value.hint


def test_a_client_s_record_that_has_no_likelihood_is_refused(
    make_tiny_model: Callable[..., LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    model = make_tiny_model(tied=False)
    (token,) = encoder.tokenizer("~")["input_ids"]
    assert not any("~" in canary.text for canary in canaries)
    model.get_input_embeddings().weight.data[token] = math.nan
    records = [Record(text, text=text) for text in ("a~b", "abc")]
    assert audit(model, encoder, canaries).gaps
    with pytest.raises(UserError, match="of the clients' records are no finite"):
        audit(model, encoder, canaries, groups=[RecordGroup("a", records[:1], records[1:])])


def test_a_secret_that_begins_its_text_is_said_to_have_no_exposure(
    models: Models, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = Encoder(tiny_tokenizer, "plain", 300)
    planted = plant(clients=["a"], copies=[1], per_cell=24, seed=0, kinds=["letter"])
    begins = [canary.secret_spans[0] for canary in planted]
    first = [span for span in begins if (span.start, span.slot) == (0, "town")]
    assert 0 < len(first) < len(planted)
    settings = Audit(prefix_tokens=[20], draws=[1], exposure=["town", "day"])
    base = audit_model("base", models["untouched"], encoder, planted, settings, seed=0)
    for slot, missing in (("town", len(first)), ("day", 0)):
        assert sum(row.exposure.n for row in base.exposure if row.slot == slot) == len(planted) - missing
    (reason,) = (reason for reason in base.refused if "exposure of" in reason)
    assert f"'town' in {len(first)} of {len(planted)} canaries" in reason
    # said once, for the base model
    again = audit_model("arm", models["halfway"], encoder, planted, settings, seed=0, reference=base)
    assert not any("exposure of" in reason for reason in again.refused)


# --- a member's own model

OTHERS = {
    True: ("Room 77: Zoltan Quist, folder 6613", "Mx Ferro met Yusuf on 21 June 2003", "Hired 1999, badge 80412"),
    False: ("Room 41: Petra Lindqvist, folder 9927", "Mx Vidal met Noor on 14 May 2011", "Hired 2007, badge 31786"),
}


@pytest.fixture(scope="module")
def of_two(canaries: list[Canary]) -> list[Canary]:
    """Those of member `a`, and others of member `b`."""
    more = [
        Canary(text, "note", "b", copies, text, (), inserted)
        for inserted, texts in OTHERS.items()
        for copies, text in zip((3, 3, 1), texts, strict=True)
    ]
    return [*canaries, *more]


@pytest.fixture(scope="module")
def groups() -> list[RecordGroup]:
    records = [Record(f"{client}{place}", text=f"{place} words of {client}") for client in "ab" for place in range(4)]
    pairs = (("a", records[:2], records[2:4]), ("b", records[4:6], records[6:]))
    return [RecordGroup(*pair) for pair in pairs] + [RecordGroup("a", records[:1], records[2:3], "validation records")]


def test_what_a_member_s_model_knows_by_heart_is_found_and_nothing_of_the_others(
    models: Models, encoder: Encoder, of_two: list[Canary]
) -> None:
    """It was trained on the canaries of `a`."""
    base = audit(models["untouched"], encoder, of_two)
    for member, at_home in (("a", "own"), ("b", "others")):
        found = audit(models["by heart"], encoder, of_two, reference=base, member=member)
        for row in found.extraction:
            assert row.exact.value == float(row.inserted and row.whose == at_home)
        for gap in found.gaps:
            assert (gap.gap.value > 1) == (gap.whose == at_home)
        assert {(test.whose, test.copies) for test in found.ranks} == {
            (whose, copies) for whose in ("own", "others") for copies in (1, 3)
        }
        for test in found.ranks:
            # 2 of 5, and 1 of 4, that rank first
            assert (test.p == pytest.approx({3: 1 / 10, 1: 1 / 4}[test.copies])) == (test.whose == at_home)


def test_what_was_shared_is_found_in_the_models_of_both(
    make_trained: Callable[..., LlamaForCausalLM], models: Models, encoder: Encoder, of_two: list[Canary]
) -> None:
    model = make_trained([canary.text for canary in of_two if canary.inserted], 200)
    for member in "ab":
        found = audit(model, encoder, of_two, member=member)
        assert {row.exact.value for row in found.extraction if row.inserted} == {1.0}
        assert {row.exact.value for row in found.extraction if not row.inserted} == {0.0}
        assert {row.whose for row in found.extraction} == {"own", "others"}


@pytest.mark.parametrize("member", ["a", "b"])
def test_parts_are_the_audits_of_their_canaries_and_records(
    member: str, models: Models, encoder: Encoder, of_two: list[Canary], groups: list[RecordGroup]
) -> None:
    """A model that is asked once gives what two audits of it would."""
    whole = audit(models["untouched"], encoder, of_two, groups=groups)
    both = audit(models["halfway"], encoder, of_two, reference=whole, groups=groups, member=member)
    for whose in ("own", "others"):
        some = [canary for canary in of_two if (canary.client == member) == (whose == "own")]
        records = [group for group in groups if (group.client == member) == (whose == "own")]
        base = audit(models["untouched"], encoder, some, groups=records)
        alone = audit(models["halfway"], encoder, some, reference=base, groups=records)
        for table in TABLES:
            rows = [row for row in getattr(both, table) if row.whose == whose]
            expected = getattr(alone, table)
            assert len(rows) == len(expected)
            for row, other in zip(rows, expected, strict=True):
                assert close(row.model_copy(update={"whose": None}).model_dump(), other.model_dump())
    assert {row.whose for row in both.membership if row.records == "validation records of a"} == {
        "own" if member == "a" else "others"
    }
    of_records = {(row.records, row.score) for row in both.membership if row.copies is None}
    assert {(group.label, "ratio") for group in groups} <= of_records
    # rows of both parts come from one asking
    assert {probe.canary for probe in both.probes} == {canary.id for canary in of_two}


def test_a_member_without_canaries_is_told_of(models: Models, encoder: Encoder, canaries: list[Canary]) -> None:
    found = audit(models["halfway"], encoder, canaries, member="b")
    assert {row.whose for row in found.gaps} == {"others"}
    assert "canaries of b in its own models: there are none" in found.refused
