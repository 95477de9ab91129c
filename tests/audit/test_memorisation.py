import random
from collections.abc import Sequence

import pytest
from transformers import LlamaForCausalLM

from allmend.audit.memorisation import Findings, audit_model
from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.errors import UserError
from allmend.recipe import Audit

PREFIXES = (4, 12, 20)


def settings(prefixes: Sequence[int]) -> Audit:
    return Audit(prefix_tokens=list(prefixes), exposure=[], top_k=0)


def audit(
    model: LlamaForCausalLM, encoder: Encoder, canaries: Sequence[Canary], prefixes: Sequence[int] = PREFIXES
) -> Findings:
    return audit_model("arm", model, encoder, canaries, settings(prefixes), seed=0)


def test_what_is_known_by_heart_is_extracted_and_no_control_is(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    found = audit(models["by heart"], encoder, canaries)
    assert len(found.extraction) == 2 * 2 * len(PREFIXES)  # copies, groups, prefixes
    for row in found.extraction:
        assert row.model == "arm"
        assert (row.exact.value, row.approximate.value >= row.exact.value) == (float(row.inserted), True)
    assert all(gap.gap.value > 1 for gap in found.gaps)
    assert found.skipped == 0


def test_an_untouched_model_gives_nothing_away(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    for row in audit(models["untouched"], encoder, canaries).extraction:
        assert row.exact.value == 0
        assert row.exact.high is not None
        assert row.exact.high > 0.5  # a handful of canaries excludes little


def test_the_order_of_canaries_does_not_matter(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    shuffled = list(canaries)
    random.Random(1).shuffle(shuffled)
    one, other = (audit(models["halfway"], encoder, order) for order in (canaries, shuffled))
    for left, right in zip([*one.extraction, *one.gaps], [*other.extraction, *other.gaps], strict=True):
        for name, value in left:
            if hasattr(value, "value"):
                assert (value.value, value.n) == (
                    pytest.approx(getattr(right, name).value, abs=1e-5),
                    getattr(right, name).n,
                )
            else:
                assert value == getattr(right, name)


def test_prefixes_that_leave_nothing_are_counted(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    lengths = [len(canary.text) for canary in canaries]  # bytes are tokens
    for prefix in (min(lengths) - 1, min(lengths), max(lengths) - 1, max(lengths), 500):
        found = audit(models["untouched"], encoder, canaries, [prefix])
        assert found.skipped == sum(length <= prefix for length in lengths)
        assert sum(row.exact.n for row in found.extraction) == len(canaries) - found.skipped
    assert found.extraction == ()
    assert found.gaps


def test_a_prefix_named_twice_counts_once(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    one = audit(models["untouched"], encoder, canaries, [12, 500, 4])
    twice = audit(models["untouched"], encoder, canaries, [4, 12, 12, 500, 500])
    assert (twice.extraction, twice.discoverable, twice.skipped) == (one.extraction, one.discoverable, one.skipped)
    assert [row.prefix_tokens for row in one.extraction] == [4] * 4 + [12] * 4


def test_it_tells_how_far_it_is(tiny_model: LlamaForCausalLM, encoder: Encoder, canaries: list[Canary]) -> None:
    told: list[int] = []
    audit_model("arm", tiny_model, encoder, canaries, settings([4]), seed=0, on_tokens=told.append)
    assert sum(told) >= sum(2 * len(canary.text) - 4 for canary in canaries)


@pytest.mark.parametrize("kept", [[True], [False], []])
def test_inserted_canaries_need_controls(
    tiny_model: LlamaForCausalLM, encoder: Encoder, canaries: list[Canary], kept: list[bool]
) -> None:
    with pytest.raises(UserError, match="one of the two is missing"):
        audit(tiny_model, encoder, [canary for canary in canaries if canary.inserted in kept])
