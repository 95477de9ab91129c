from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from allmend.audit.likelihood import Reading, likelihood_gaps, read_texts
from allmend.data.canaries import Canary
from allmend.data.chat import Encoded, Encoder
from allmend.data.records import Record
from allmend.intervals import difference, mean

LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def encoded(encoder: Encoder, canaries: list[Canary]) -> list[Encoded]:
    return [encoder.for_evaluation(Record(canary.id, text=canary.text)) for canary in canaries]


@pytest.mark.parametrize("state", ["untouched", "halfway", "by heart"])
@pytest.mark.parametrize("tokens_per_pass", [16, 90, 1000])
@torch.no_grad()
def test_packed_texts_are_read_as_if_alone(
    models: dict[str, LlamaForCausalLM],
    log_probs: LogProbs,
    encoded: list[Encoded],
    state: str,
    tokens_per_pass: int,
) -> None:
    model = models[state]
    told: list[int] = []
    readings = read_texts(model, encoded, tokens_per_pass=tokens_per_pass, on_tokens=told.append)
    assert sum(told) == sum(map(len, encoded))
    for text, reading in zip(encoded, readings, strict=True):
        assert torch.equal(reading.ids, text.ids)
        assert torch.allclose(reading.log_likelihood, log_probs(model, text.ids).double(), atol=1e-4)
        assert torch.equal(reading.hit, model(text.ids[None]).logits[0, :-1].argmax(-1) == text.ids[1:])


def test_texts_too_short_to_read(tiny_model: LlamaForCausalLM, encoder: Encoder) -> None:
    short = [encoder.for_evaluation(Record(text or "none", text=text)) for text in ("a", "", "ab")]
    assert [len(reading.log_likelihood) for reading in read_texts(tiny_model, short)] == [0, 0, 1]


def canary(id: str, copies: int, *, inserted: bool) -> Canary:
    return Canary(id, "note", "a", copies, "text", (), inserted)


def reading(*values: float) -> Reading:
    return Reading(
        torch.zeros(len(values) + 1, dtype=torch.int64), torch.tensor(values).double(), torch.tensor(values) > 0
    )


def test_a_gap_is_inserted_minus_control_by_copies() -> None:
    canaries = [
        canary("a", 10, inserted=True),
        canary("b", 1, inserted=False),
        canary("c", 10, inserted=False),
        canary("d", 10, inserted=True),
        canary("e", 1, inserted=True),
        canary("f", 10, inserted=False),
    ]
    readings = [reading(-1, -3), reading(-4), reading(-5, -6, -7), reading(-1), reading(-2, -2), reading(-9)]
    one, ten = likelihood_gaps("base", canaries, readings)
    assert (one.model, one.copies, ten.copies) == ("base", 1, 10)
    assert one.gap.value == 2
    assert ten.inserted == mean([-2, -1])
    assert ten.control == mean([-6, -9])
    assert ten.gap == difference([-2, -1], [-6, -9])


def test_copies_without_both_groups_have_no_gap() -> None:
    canaries = [canary("a", 1, inserted=True), canary("b", 3, inserted=True), canary("c", 3, inserted=False)]
    (gap,) = likelihood_gaps("base", canaries, [reading(-1), reading(-2), reading(-3)])
    assert gap.copies == 3


@pytest.mark.parametrize("state", ["untouched", "by heart"])
def test_equal_groups_have_no_gap(
    models: dict[str, LlamaForCausalLM], encoded: list[Encoded], canaries: list[Canary], state: str
) -> None:
    twins = [replace(canary, inserted=not canary.inserted) for canary in canaries]
    readings = read_texts(models[state], [*encoded, *encoded])
    for gap in likelihood_gaps("base", [*canaries, *twins], readings):
        assert gap.gap.value == pytest.approx(0, abs=1e-6)


def test_learning_the_inserted_ones_makes_a_gap(
    models: dict[str, LlamaForCausalLM], encoded: list[Encoded], canaries: list[Canary]
) -> None:
    found = {state: likelihood_gaps(state, canaries, read_texts(model, encoded)) for state, model in models.items()}
    assert [gap.copies for gap in found["by heart"]] == [1, 3]
    for before, halfway, after in zip(*found.values(), strict=True):
        assert before.gap.value < halfway.gap.value < after.gap.value
        assert after.gap.value > 1
        assert after.inserted.value > -0.1
