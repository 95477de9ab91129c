"""A member's own records: what counts as completed, and what the base model completes too."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from allmend.audit.extraction import matched_tokens
from allmend.audit.likelihood import Reading, read_texts
from allmend.audit.mine import own_records
from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.data.records import Message, Record
from allmend.results import OwnRecords


def reading(hits: Sequence[bool], likelihood: float = -1.0) -> Reading:
    values = torch.full((len(hits),), likelihood, dtype=torch.float64)
    return Reading(torch.arange(len(hits) + 1), values, torch.tensor(hits, dtype=torch.bool), values, values, values)


@given(st.lists(st.booleans(), max_size=12), st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 9))
def test_a_record_against_its_definition(hits: list[bool], by_base: list[bool], suffix: int) -> None:
    """Half of the response is shown; of the rest, at most `suffix` tokens count up to the first wrong one."""
    rows, summary = own_records(
        "arm", ["r"], [reading(hits)], [reading(by_base[: len(hits)], -2.0)], suffix_tokens=suffix
    )
    asked = hits[max(1, round(len(hits) / 2)) :][:suffix]
    if not asked:
        assert (rows, summary) == ([], None)
        return
    (row,) = rows
    assert row.asked == len(asked)
    assert row.matched == (asked.index(False) if False in asked else len(asked))
    of_base = by_base[: len(hits)][max(1, round(len(hits) / 2)) :][:suffix]
    assert row.matched_by_base == (of_base.index(False) if False in of_base else len(of_base))
    assert summary is not None
    assert summary.only_by_model == (["r"] if row.matched == row.asked > row.matched_by_base else [])
    assert summary.likelihood_gain.value == pytest.approx(1.0)


def test_what_the_base_model_completes_too_was_guessed() -> None:
    right, wrong = [True] * 8, [True] * 7 + [False]
    now = [reading(right), reading(right), reading(wrong), reading(wrong), reading([True])]
    before = [reading(right), reading(wrong), reading(right), reading(wrong), reading([True])]
    rows, summary = own_records("arm", ["both", "new", "lost", "none", "short"], now, before, suffix_tokens=50)
    assert [row.record for row in rows] == ["both", "new", "lost", "none"]  # one token cannot be half shown
    assert isinstance(summary, OwnRecords)
    assert summary.only_by_model == ["new"]
    assert (summary.completed.value, summary.completed_by_base.value) == (0.5, 0.5)
    assert (summary.completed.n, summary.matched.n) == (4, 4)
    assert summary.matched.value == pytest.approx((1 + 1 + 0.75 + 0.75) / 4)


def test_no_records_have_no_figures() -> None:
    assert own_records("arm", [], [], [], suffix_tokens=5) == ([], None)


def test_a_model_completes_what_it_knows_by_heart_and_the_base_does_not(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    encoded = [encoder.for_training(Record(canary.id, text=canary.text)) for canary in canaries]
    base, tuned = (read_texts(models[name], encoded) for name in ("untouched", "by heart"))
    rows, summary = own_records("arm", [canary.id for canary in canaries], tuned, base, suffix_tokens=50)
    assert summary is not None
    assert summary.only_by_model == [canary.id for canary in canaries if canary.inserted]
    for row, one in zip(rows, tuned, strict=True):
        # the same as the audit's own rule for a prefix of that length
        start = len(one.ids) - row.asked
        assert row.matched == matched_tokens(one, range(start, len(one.ids)))


def test_a_prompt_is_shown_whole_and_only_the_response_is_asked_for(
    encoder: Encoder, make_trained: Callable[..., LlamaForCausalLM], tiny_model: LlamaForCausalLM
) -> None:
    record = Record("r", messages=(Message("user", "Where is the key?"), Message("assistant", "under the stone")))
    encoded = encoder.for_training(record)
    (row,), _ = own_records(
        "arm", ["r"], read_texts(tiny_model, [encoded]), read_texts(tiny_model, [encoded]), suffix_tokens=50
    )
    targets = int(encoded.target.sum())
    assert row.asked == targets - round(targets / 2)
    assert row.asked < len("under the stone") + 2
