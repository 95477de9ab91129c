from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from allmend.audit.likelihood import Reading, Scheme, _values, likelihood_gaps, read_texts
from allmend.data.canaries import Canary
from allmend.data.chat import Encoded, Encoder
from allmend.data.records import Record, question
from allmend.intervals import difference, mean

LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def encoded(encoder: Encoder, canaries: list[Canary]) -> list[Encoded]:
    return [encoder.for_evaluation(Record(canary.id, text=canary.text)) for canary in canaries]


def in_double(logits: torch.Tensor, targets: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, ...]:
    """log-likelihood, mean, deviation and sampled [N] from logits [N, V], the long way and in float64."""
    log_p = logits.double().log_softmax(-1)
    at = torch.arange(len(targets))
    mean = -torch.distributions.Categorical(logits=log_p).entropy()
    deviation = ((log_p.exp() * log_p**2).sum(-1) - mean**2).clamp(min=0).sqrt()
    kept = logits.argsort(dim=-1, descending=True, stable=True)[:, : scheme.top_k or None]
    allowed = torch.full_like(log_p, -torch.inf).scatter(1, kept, logits.double().gather(1, kept))
    sampled = (allowed / scheme.temperature).log_softmax(-1)
    return log_p[at, targets], mean, deviation, sampled[at, targets]


def close(found: torch.Tensor, expected: torch.Tensor, *, atol: float) -> bool:
    # a deviation near 0 is the root of a difference, of which rounding leaves fewer digits
    return torch.allclose(found, expected, atol=atol, rtol=1e-4)


SCHEMES = [Scheme(), Scheme(temperature=0.5), Scheme(top_k=40), Scheme(temperature=2.0, top_k=3), Scheme(top_k=1000)]


@pytest.mark.parametrize("state", ["untouched", "halfway", "by heart"])
@pytest.mark.parametrize(("tokens_per_pass", "scheme"), [*zip([16, 90, 1000, 50, 200], SCHEMES, strict=True)])
@torch.no_grad()
def test_packed_texts_are_read_as_if_alone(
    models: dict[str, LlamaForCausalLM], encoded: list[Encoded], state: str, tokens_per_pass: int, scheme: Scheme
) -> None:
    model = models[state]
    told: list[int] = []
    readings = read_texts(model, encoded, scheme=scheme, tokens_per_pass=tokens_per_pass, on_tokens=told.append)
    assert sum(told) == sum(map(len, encoded))
    for text, reading in zip(encoded, readings, strict=True):
        assert torch.equal(reading.ids, text.ids)
        logits = model(text.ids[None]).logits[0, :-1]
        log_likelihood, mean, deviation, sampled = in_double(logits, text.ids[1:], scheme)
        assert close(reading.log_likelihood, log_likelihood, atol=1e-4)
        assert close(reading.mean, mean, atol=1e-4)
        assert close(reading.deviation, deviation, atol=1e-3)
        assert torch.equal(reading.sampled == -torch.inf, sampled == -torch.inf)
        assert close(reading.sampled, sampled, atol=1e-3)
        assert torch.equal(reading.hit, logits.argmax(-1) == text.ids[1:])


def test_of_a_record_with_a_prompt_the_response_is_read(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, log_probs: LogProbs
) -> None:
    records = [question("a", "one?", "yes it is"), question("b", "two?", "both")]
    encoded = [encoder.for_training(record) for record in records]
    for text, reading in zip(encoded, read_texts(models["halfway"], encoded), strict=True):
        expected = log_probs(models["halfway"], text.ids)[text.target[1:]].double()
        assert 0 < len(expected) < len(text) - 1
        assert torch.allclose(reading.log_likelihood, expected, atol=1e-4)


def test_texts_too_short_to_read(tiny_model: LlamaForCausalLM, encoder: Encoder) -> None:
    short = [encoder.for_evaluation(Record(text or "none", text=text)) for text in ("a", "", "ab")]
    for reading, length in zip(read_texts(tiny_model, short), [0, 0, 1], strict=True):
        values = [reading.log_likelihood, reading.hit, reading.mean, reading.deviation, reading.sampled]
        assert [len(value) for value in values] == [length] * 5


LOGITS = st.integers(2, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(-3, 3), min_size=width, max_size=width).map(lambda row: [float(v) for v in row]),
        min_size=1,
        max_size=4,
    ).map(torch.tensor)
)


@given(LOGITS, st.floats(0.2, 5), st.integers(0, 7))
def test_every_token_of_the_vocabulary_is_read_right_with_ties_too(
    logits: torch.Tensor, temperature: float, top_k: int
) -> None:
    rows, width = logits.shape
    scheme = Scheme(temperature, top_k)
    source_of, targets = torch.arange(rows).repeat_interleave(width), torch.arange(width).repeat(rows)
    log_likelihood, hit, mean, deviation, sampled = _values(logits.clone(), source_of, targets, scheme)
    expected = in_double(logits[source_of], targets, scheme)
    for found, right in zip((log_likelihood, mean, deviation, sampled), expected, strict=True):
        assert found.dtype == torch.float64
        assert close(found, right, atol=1e-3)
    assert torch.equal(hit, (logits.argmax(-1)[:, None] == torch.arange(width)).flatten())
    by_row = sampled.view(rows, width)
    assert torch.allclose(by_row.exp().sum(-1), torch.ones(rows).double(), atol=1e-5)
    assert ((by_row > -torch.inf).sum(-1) == min(top_k or width, width)).all()
    if top_k == 1:
        assert torch.equal(sampled == 0, hit)


@given(LOGITS)
def test_log_likelihood_has_the_mean_and_deviation_that_it_is_expected_to_have(logits: torch.Tensor) -> None:
    rows, width = logits.shape
    source_of, targets = torch.arange(rows).repeat_interleave(width), torch.arange(width).repeat(rows)
    log_p, _, mean, deviation, _ = (
        value.view(rows, width) for value in _values(logits.clone(), source_of, targets, Scheme())
    )
    assert close((log_p.exp() * (log_p - mean)).sum(-1), torch.zeros(rows).double(), atol=1e-5)
    assert close((log_p.exp() * (log_p - mean) ** 2).sum(-1), deviation[:, 0] ** 2, atol=1e-5)


def test_a_wide_vocabulary_is_read_block_by_block() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(20, 40_000, generator=generator)  # 800,000 logits: four blocks
    source_of, targets = torch.randint(20, (35,), generator=generator), torch.randint(500, (35,), generator=generator)
    scheme = Scheme(top_k=20_000)
    expected = in_double(logits[source_of], targets, scheme)
    log_likelihood, _, mean, deviation, sampled = _values(logits.clone(), source_of, targets, scheme)
    for found, right in zip((log_likelihood, mean, deviation, sampled), expected, strict=True):
        assert close(found, right, atol=1e-4)
    assert 5 < (sampled == -torch.inf).sum() < 30


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min, -1e5])
def test_tokens_that_a_model_excludes_do_not_count(least: float) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    wider = torch.cat([logits, torch.full((4, 3), least)], 1)
    at = torch.arange(4)
    for found, right in zip(_values(wider, at, at, Scheme()), _values(logits, at, at, Scheme()), strict=True):
        assert torch.allclose(found.double(), right.double(), atol=1e-6)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (-1.0, 5), (1.0, -1)])
def test_no_scheme(temperature: float, top_k: int) -> None:
    with pytest.raises(ValueError, match="no sampling"):
        Scheme(temperature, top_k)


def canary(id: str, copies: int, *, inserted: bool) -> Canary:
    return Canary(id, "note", "a", copies, "text", (), inserted)


def reading(*values: float) -> Reading:
    nothing = torch.zeros(len(values), dtype=torch.float64)
    ids, found = torch.zeros(len(values) + 1, dtype=torch.int64), torch.tensor(values).double()
    return Reading(ids, found, found > 0, nothing, nothing, nothing)


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
