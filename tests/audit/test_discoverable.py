import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import GenerationConfig, LlamaForCausalLM

from allmend.audit.discoverable import at_least_once, discoverable_rows, log_probability
from allmend.audit.extraction import Prefix, exact_matches
from allmend.audit.likelihood import Reading, Scheme, read_texts
from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.intervals import mean, share

Read = Callable[[str, Scheme], list[Reading]]


@pytest.fixture(scope="module")
def read(models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]) -> Read:
    encoded = [encoder.for_evaluation(Record(canary.id, text=canary.text)) for canary in canaries]
    return lambda state, scheme: read_texts(models[state], encoded, scheme=scheme)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(top_k=4), Scheme(temperature=1.7, top_k=12)])
def test_the_probability_is_that_of_sampling(models: dict[str, LlamaForCausalLM], read: Read, scheme: Scheme) -> None:
    tokens, draws, size = 3, 4000, 5
    readings = read("halfway", scheme)
    found = [
        (reading, part, math.exp(log_probability(reading, part)))
        for reading in readings
        for part in (range(start, start + tokens) for start in range(5, 30, 6))
    ]
    between = [one for one in found if 0.05 < one[2] < 0.8][:3]
    assert between
    config = GenerationConfig(
        do_sample=True,
        temperature=scheme.temperature,
        top_k=scheme.top_k,
        max_new_tokens=tokens,
        pad_token_id=257,
        eos_token_id=None,
    )
    for reading, part, p in between:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            prompts = reading.ids[: part.start].repeat(draws, 1)
            drawn = models["halfway"].generate(prompts, generation_config=config)[:, part.start :]
        right = (drawn == reading.ids[part.start : part.stop]).all(-1)
        in_some = right.view(-1, size).any(-1)
        for successes, expected in ((right, p), (in_some, at_least_once(log_probability(reading, part), size))):
            assert stats.binomtest(int(successes.sum()), len(successes), expected).pvalue > 1e-3


@pytest.mark.parametrize("state", ["untouched", "halfway", "by heart"])
@pytest.mark.parametrize("prefix", [Prefix(tokens=1), Prefix(tokens=20), Prefix(share=0.9)])
def test_of_one_token_to_choose_from_extraction_is_greedy(read: Read, state: str, prefix: Prefix) -> None:
    readings = read(state, Scheme(top_k=1))
    for reading, exact in zip(readings, exact_matches(readings, prefix), strict=True):
        log_p = log_probability(reading, prefix.behind(len(reading.ids)))
        assert log_p == (0 if exact else -math.inf)
        assert at_least_once(log_p, 1) == at_least_once(log_p, 1000) == exact


def test_some_canaries_are_extracted_and_others_not(read: Read) -> None:
    found = {state: exact_matches(read(state, Scheme()), Prefix(tokens=20)) for state in ("untouched", "by heart")}
    assert not any(found["untouched"])
    assert any(found["by heart"])
    assert not all(found["by heart"])


@pytest.mark.parametrize("top_k", [0, 40])
@pytest.mark.parametrize("state", ["untouched", "by heart"])
def test_near_temperature_0_extraction_is_greedy(read: Read, state: str, top_k: int) -> None:
    prefix = Prefix(tokens=20)
    readings = read(state, Scheme(temperature=1e-5, top_k=top_k))
    for reading, exact in zip(readings, exact_matches(readings, prefix), strict=True):
        p = at_least_once(log_probability(reading, prefix.behind(len(reading.ids))), 1)
        assert p == pytest.approx(float(bool(exact)), abs=1e-6)


def test_a_suffix_multiplies_its_tokens_probabilities() -> None:
    nothing = torch.zeros(5, dtype=torch.float64)
    sampled = torch.tensor([0.5, 0.25, 0.8, 0.1, 0.9], dtype=torch.float64).log()
    reading = Reading(torch.arange(6), nothing, nothing > 0, nothing, nothing, sampled)
    for part, p in ((range(1, 6), 0.009), (range(2, 4), 0.2), (range(5, 6), 0.9), (range(1, 2), 0.5)):
        assert at_least_once(log_probability(reading, part), 1) == pytest.approx(p)
    for part in (range(0, 3), range(6, 6)):
        with pytest.raises(ValueError, match="no continuation"):
            log_probability(reading, part)


PROBABILITIES = st.fractions(0, 1, max_denominator=10**6) | st.integers(5, 300).map(lambda d: Fraction(1, 10**d))


def _log(p: Fraction) -> float:
    return math.log(p) if p else -math.inf


@given(PROBABILITIES, st.integers(1, 60))
def test_at_least_once_is_exact(p: Fraction, draws: int) -> None:
    exact = 1 - (1 - p) ** draws
    assert at_least_once(_log(p), draws) == pytest.approx(float(exact), rel=1e-11, abs=1e-300)


@given(st.floats(-800, 0) | st.floats(-1e-9, 0) | st.just(-math.inf), st.integers(1, 10**9), st.integers(1, 10**9))
def test_more_draws_bring_out_no_less(log_p: float, first: int, second: int) -> None:
    fewer, more = sorted((first, second))
    once, some, most = (at_least_once(log_p, n) for n in (1, fewer, more))
    assert once == pytest.approx(math.exp(log_p), rel=1e-9)
    assert 0 <= once <= some <= most <= 1
    assert most <= more * once * (1 + 1e-9)


@pytest.mark.parametrize("suffix", [None, 4])
def test_rows_are_means_over_their_cells(read: Read, canaries: list[Canary], suffix: int | None) -> None:
    readings = read("halfway", Scheme())
    prefix = Prefix(share=0.5)
    draws = (1, 10, 1000)
    rows = discoverable_rows("base", canaries, readings, prefix, draws=draws, suffix_tokens=suffix)
    cells = [(copies, inserted, n) for copies in (1, 3) for inserted in (True, False) for n in draws]
    assert [(row.copies, row.inserted, row.draws) for row in rows] == cells
    for row in rows:
        parts = [
            (reading, prefix.behind(len(reading.ids), suffix))
            for canary, reading in zip(canaries, readings, strict=True)
            if (canary.copies, canary.inserted) == (row.copies, row.inserted)
        ]
        p = [reading.sampled[part.start - 1 : part.stop - 1].exp().prod().item() for reading, part in parts]
        found = [float(1 - (1 - Fraction(one)) ** row.draws) for one in p]
        expected = mean(found, bounds=(0, 1))
        assert row.probability.value == pytest.approx(expected.value, rel=1e-9)
        assert row.probability.n == expected.n
        if expected.low is not None:
            assert (row.probability.low, row.probability.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
        assert row.likely == share(sum(one >= 0.5 for one in found), len(found))
        assert (row.model, row.prefix) == ("base", "50 %")
        assert row.prefix_tokens == sum(part.start for _, part in parts) / len(parts)
    for before, after in pairwise(rows):
        if before.draws < after.draws:
            assert before.probability.value <= after.probability.value
            assert before.likely.value <= after.likely.value


def test_what_is_learnt_is_likely_and_its_controls_are_not(read: Read, canaries: list[Canary]) -> None:
    rows = discoverable_rows("fedavg", canaries, read("by heart", Scheme(top_k=40)), Prefix(tokens=20), draws=[1])
    assert {(row.inserted, row.likely.value) for row in rows} == {(True, 1.0), (False, 0.0)}


def test_canaries_within_the_prefix_are_left_out(read: Read, canaries: list[Canary]) -> None:
    readings = read("untouched", Scheme())
    short = replace(readings[0], ids=readings[0].ids[:10], sampled=readings[0].sampled[:9])
    rows = discoverable_rows("base", canaries, [short, *readings[1:]], Prefix(tokens=10), draws=[1])
    assert [row.probability.n for row in rows] == [1, 1, 1, 2]
    assert discoverable_rows("base", canaries, readings, Prefix(tokens=500), draws=[1]) == []
