"""What one party sees of a round: the same gap as the audit's own, in the model that it holds."""

from dataclasses import replace

import pytest
from transformers import LlamaForCausalLM

from allmend.audit.likelihood import likelihood_gaps, read_texts
from allmend.audit.views import view_rows
from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.data.records import Record


@pytest.fixture
def of_two(canaries: list[Canary]) -> list[Canary]:
    """The canaries, and the same texts the other way round at another client."""
    return [*canaries, *(replace(one, id=f"b {one.id}", client="b", inserted=not one.inserted) for one in canaries)]


def test_members_see_the_model_that_is_sent_to_all(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    rows = view_rows("arm", 2, None, models["halfway"], encoder, canaries)
    readings = read_texts(models["halfway"], [encoder.for_evaluation(Record(c.id, text=c.text)) for c in canaries])
    assert [(row.copies, row.gap) for row in rows] == [
        (gap.copies, gap.gap) for gap in likelihood_gaps("arm", canaries, readings)
    ]
    assert {(row.model, row.round, row.party, row.of) for row in rows} == {("arm", 2, "members", None)}
    assert all(row.gap.value > 0.5 for row in rows)


def test_a_coordinator_sees_a_members_own_canaries_in_its_update(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, of_two: list[Canary]
) -> None:
    """The model knows what a planted; at b the same texts are controls."""
    gaps = {}
    for member in ("a", "b"):
        rows = view_rows("arm", 1, member, models["by heart"], encoder, of_two)
        assert {(row.party, row.of) for row in rows} == {("coordinator", member)}
        gaps[member] = {row.copies: row.gap for row in rows}
    assert gaps["a"].keys() == gaps["b"].keys() == {1, 3}
    for copies in (1, 3):
        assert gaps["a"][copies].value == pytest.approx(-gaps["b"][copies].value)
        assert gaps["a"][copies].value > 1
        assert gaps["a"][copies].n == sum(one.copies == copies for one in of_two) / 2
    both = view_rows("arm", 1, None, models["by heart"], encoder, of_two)
    assert [row.gap.value for row in both] == pytest.approx([0, 0])


def test_a_member_without_canaries_has_no_rows(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    assert view_rows("arm", 1, "nobody", models["halfway"], encoder, canaries) == []
    assert view_rows("arm", 1, None, models["halfway"], encoder, [c for c in canaries if c.inserted]) == []
