"""The oracles read each candidate alone and count ranks one by one; the null needs no model."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.audit.exposure import SecretExposure, expose, exposure, exposure_rows, value_likelihoods
from allmend.data.canaries import Canary, SecretSpan
from allmend.data.chat import Encoder
from allmend.errors import UserError
from allmend.intervals import mean

LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
MakeTrained = Callable[..., LlamaForCausalLM]

NULL = 1 / math.log(2)
"""Mean exposure of what no model has seen: E[−log2 U] = 1.44 bits."""

TEXT = "Ward 12C: Ada Okafor, file 7"
WARDS = [f"{number}{wing}" for number in range(1, 31) for wing in "ABCDEF"]


def span(text: str, value: str) -> SecretSpan:
    start = text.index(value)
    return SecretSpan(start, start + len(value), "ward", 1.0)


def draws(n: int, *, seed: int = 0) -> torch.Tensor:
    """n log-likelihoods that no fit is needed to believe in, skewed to the left."""
    generator = np.random.default_rng(seed)
    return -torch.from_numpy(20 + 4 * stats.skewnorm.rvs(3.0, size=n, random_state=generator))


# --- likelihoods of candidates


@pytest.mark.parametrize("merges", [(), ("Ġ1", "12", "C:", "2C", "Ġ2", "Ġ12", "D:", ":Ġ")])
@pytest.mark.parametrize("tokens_per_pass", [1, 30, 64, 1000])
@torch.no_grad()
def test_candidates_are_read_as_if_alone(
    make_tiny_tokenizer: MakeTokenizer,
    tiny_model: LlamaForCausalLM,
    log_probs: LogProbs,
    merges: Sequence[str],
    tokens_per_pass: int,
) -> None:
    tokenizer = make_tiny_tokenizer(merges=merges)
    secret = span(TEXT, "12C")
    values = ["12C", "2C", "1", "12", "20D", "a long value of the slot", "12C: Ada", "1é"]
    told: list[int] = []
    found = value_likelihoods(
        tiny_model,
        Encoder(tokenizer, "plain", 4),  # of which training alone takes notice
        TEXT,
        secret,
        values,
        tokens_per_pass=tokens_per_pass,
        on_tokens=told.append,
    )
    sums, lengths = [], []
    for value in values:
        whole = TEXT[: secret.start] + value + TEXT[secret.end :]
        encoded = tokenizer(whole, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        last = max(n for n, place in enumerate(encoded["offset_mapping"]) if place[0] < secret.start + len(value))
        sums.append(log_probs(tiny_model, ids)[:last].sum().item())
        lengths.append(last + 1)
    # what all begin with is not counted: by the same number for each
    common = [total - one for total, one in zip(sums, found.tolist(), strict=True)]
    assert common == pytest.approx([common[0]] * len(values), abs=1e-4)
    assert max(told) <= max(tokens_per_pass, *lengths)
    assert (len(told) == 1) == (tokens_per_pass >= 64)


@pytest.mark.parametrize("tokens_per_pass", range(8, 60, 3))
def test_passes_are_filled_up_to_their_limit(
    tiny_model: LlamaForCausalLM, encoder: Encoder, tokens_per_pass: int
) -> None:
    told: list[int] = []
    values = [ward for ward in WARDS if len(ward) == 3][::2][:50]
    expose(
        tiny_model,
        encoder,
        f"Ward {values[0]}",
        span(f"Ward {values[0]}", values[0]),
        values,
        values=99,
        tokens_per_pass=tokens_per_pass,
        on_tokens=told.append,
    )
    prompt, at_once = len("Ward "), (tokens_per_pass - len("Ward ")) // 3
    passes = math.ceil(50 / at_once)
    assert max(told) <= tokens_per_pass
    assert sum(told) == 50 * 3 + passes * prompt


@torch.no_grad()
def test_the_prompt_is_what_all_candidates_begin_with(
    make_tiny_tokenizer: MakeTokenizer, tiny_model: LlamaForCausalLM, log_probs: LogProbs
) -> None:
    tokenizer = make_tiny_tokenizer(merges=["Ġ1", "Ġ2"])
    found = value_likelihoods(tiny_model, Encoder(tokenizer, "plain", 99), TEXT, span(TEXT, "12C"), ["1A", "2B"])
    for value, one in zip(["1A", "2B"], found.tolist(), strict=True):
        values = log_probs(tiny_model, torch.tensor(tokenizer(f"Ward {value}")["input_ids"]))
        assert one == pytest.approx(values[-2:].sum().item(), abs=1e-5)  # " 1" with its space, and "A"


def test_a_secret_with_nothing_before_it(make_tiny_tokenizer: MakeTokenizer, tiny_model: LlamaForCausalLM) -> None:
    tokenizer = make_tiny_tokenizer(special=["<eos>", "<bos>"])
    secret = SecretSpan(0, 4, "place", 1.0)
    assert expose(tiny_model, Encoder(tokenizer, "plain", 99), TEXT, secret, ["Room", "Wing"], values=3) is None
    # but where they all begin with the same token, that one predicts the rest
    found = expose(tiny_model, Encoder(tokenizer, "plain", 99), TEXT, secret, ["Wing"], values=2)
    assert found is not None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.convert_tokens_to_ids("<bos>"))]
    )
    found = expose(tiny_model, Encoder(tokenizer, "plain", 99), TEXT, secret, ["Room", "Wing"], values=3)
    assert found is not None
    assert found.compared == 3


def test_a_damaged_model_exposes_nothing(
    tiny_tokenizer: PreTrainedTokenizerFast, make_tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = make_tiny_model()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="no finite numbers"):
        expose(model, Encoder(tiny_tokenizer, "plain", 99), TEXT, span(TEXT, "12C"), WARDS, values=len(WARDS))


# --- ranks


@pytest.mark.parametrize("true", ["12C", "4F"])
def test_the_rank_is_among_distinct_values(
    tiny_model: LlamaForCausalLM, log_probs: LogProbs, encoder: Encoder, true: str
) -> None:
    text = f"Ward {true}"
    found = expose(tiny_model, encoder, text, span(text, true), [*WARDS, *WARDS[:50], true], values=len(WARDS))
    with torch.no_grad():
        scores = {
            ward: log_probs(tiny_model, torch.tensor(encoder.tokenizer(f"Ward {ward}")["input_ids"]))[4:].sum().item()
            for ward in WARDS
        }
    rank = sorted(WARDS, key=lambda ward: -scores[ward]).index(true) + 1
    assert found == SecretExposure("ward", len(WARDS), len(WARDS), math.log2(len(WARDS)) - math.log2(rank))
    assert rank > 1


def test_what_is_known_by_heart_is_wholly_exposed(
    tiny_model: LlamaForCausalLM, make_trained: MakeTrained, encoder: Encoder
) -> None:
    model = make_trained([TEXT], 100)
    known = expose(model, encoder, TEXT, span(TEXT, "12C"), WARDS, values=len(WARDS))
    assert known.bits == math.log2(len(WARDS))
    sampled = expose(model, encoder, TEXT, span(TEXT, "12C"), WARDS[:100], values=10**6)
    assert (sampled.compared, sampled.bits) == (101 - ("12C" in WARDS[:100]), math.log2(sampled.compared))
    # another value in its place, and a model that never read it
    for other, value in ((model, "7B"), (tiny_model, "12C")):
        text = TEXT.replace("12C", value)
        assert expose(other, encoder, text, span(text, value), WARDS, values=len(WARDS)).bits < known.bits - 1


def test_a_value_that_cannot_be(tiny_model: LlamaForCausalLM, encoder: Encoder) -> None:
    with pytest.raises(UserError, match="'99Z' is none of the 180 values that 'ward' can have"):
        expose(tiny_model, encoder, "Ward 99Z", span("Ward 99Z", "99Z"), WARDS, values=len(WARDS))


LIKELIHOODS = st.lists(st.integers(-4, 0).map(float), max_size=12)


@given(st.integers(-4, 0).map(float), LIKELIHOODS)
def test_ties_are_broken_as_if_by_lot(true: float, others: list[float]) -> None:
    found = exposure(true, torch.tensor(others, dtype=torch.float64), slot="s", values=len(others) + 1)
    better = sum(other > true for other in others)
    ranks = range(better + 1, better + others.count(true) + 2)
    assert 2 ** -(found.bits - math.log2(len(others) + 1)) == pytest.approx(fmean(ranks))
    assert found.fitted is None


@given(st.floats(-60, 0), st.sampled_from([0, 1, 10, 200]), st.floats(0, 40), st.integers(1, 10**8))
@settings(max_examples=50, deadline=None)
def test_exposure_is_bounded_and_grows_with_likelihood(true: float, n: int, more: float, further: int) -> None:
    values, size = draws(n).round(decimals=1), n + further
    low, high = (exposure(one, values, slot="s", values=size) for one in (true, true + more))
    for one in (low, high):
        assert 0 <= one.bits <= math.log2(size)
        if size > one.compared:
            assert one.fitted is not None
            assert 0 <= one.fitted <= math.log2(size)
            assert not one.poor_fit or one.fitted == one.bits
    assert low.bits <= high.bits
    assert low.poor_fit == high.poor_fit
    assert (low.fitted or 0) <= (high.fitted or 0)


# --- the null: a value drawn as the others are


def test_a_control_is_exposed_by_the_null() -> None:
    space = draws(2000)
    picks = np.random.default_rng(1).permutation(2000)
    exact, bound, fitted, poor = [], [], [], 0
    for true in picks[:200]:
        others = torch.cat([space[:true], space[true + 1 :]])
        sample = others[torch.from_numpy(np.random.default_rng(true).permutation(1999)[:300])]
        exact.append(exposure(space[true].item(), others, slot="s", values=2000).bits)
        sampled = exposure(space[true].item(), sample, slot="s", values=2000)
        bound.append(sampled.bits)
        assert sampled.fitted is not None
        fitted.append(sampled.fitted)
        poor += sampled.poor_fit
    for found in (exact, bound, fitted):
        assert fmean(found) == pytest.approx(NULL, abs=0.3)
    assert poor < 5
    # where all are drawn, there is no chance left: the mean of log2 n − log2 rank over all ranks
    every = [
        exposure(one.item(), torch.cat([space[:n], space[n + 1 :]]), slot="s", values=2000).bits
        for n, one in enumerate(space)
    ]
    assert fmean(every) == pytest.approx(fmean(math.log2(2000 / rank) for rank in range(1, 2001)))


def test_a_model_that_knows_nothing_exposes_nothing() -> None:
    for n in (1, 4, 99):
        assert exposure(-3.0, torch.full((n,), -3.0, dtype=torch.float64), slot="s", values=n + 1).bits < 1


# --- samples


def test_a_sample_understates_on_average() -> None:
    space = draws(11)
    for true in range(11):
        others = torch.cat([space[:true], space[true + 1 :]])
        exact = exposure(space[true].item(), others, slot="s", values=11).bits
        for n in (1, 4, 9):
            samples = (others[list(chosen)] for chosen in combinations(range(10), n))
            found = [exposure(space[true].item(), sample, slot="s", values=11).bits for sample in samples]
            assert fmean(found) <= exact + 1e-12
            assert max(found) <= math.log2(n + 1)


@pytest.mark.parametrize("exponent", [1, 4, 7, 11])
def test_a_fit_agrees_with_the_ranks_of_all(exponent: int) -> None:
    size = 8192
    space = draws(size).sort(descending=True).values
    true = size // 2**exponent - 1
    others = torch.cat([space[:true], space[true + 1 :]])
    exact = exposure(space[true].item(), others, slot="s", values=size).bits
    assert exact == pytest.approx(exponent)
    found = [
        exposure(
            space[true].item(),
            others[torch.from_numpy(np.random.default_rng(seed).permutation(size - 1)[:1000])],
            slot="s",
            values=size,
        )
        for seed in range(8)
    ]
    assert not any(one.poor_fit for one in found)
    assert fmean(one.fitted or 0 for one in found) == pytest.approx(exact, rel=0.1)
    if 2**exponent < 1000:
        assert fmean(one.bits for one in found) == pytest.approx(exact, rel=0.15)
    else:
        assert max(one.bits for one in found) <= math.log2(1001)


def test_a_fit_reaches_beyond_the_sample_as_the_distribution_does() -> None:
    found = []
    for seed in range(8):
        sample = draws(1000, seed=seed)
        for share in (1e-4, 1e-6):
            # the 20 + 4 z of `draws`, whose lower tail is the likelier end
            true = -(20 + 4 * stats.skewnorm.ppf(share, 3.0))
            one = exposure(true, sample, slot="s", values=10**8)
            assert one.fitted is not None
            assert one.bits == math.log2(1001)
            found.append(one.fitted / -math.log2(share))
    assert fmean(found) == pytest.approx(1, abs=0.1)
    size = next(n for n in range(1002, 9999) if -math.log2(1 / n) > math.log2(n))  # where rounding leads past the bound
    most = exposure(100.0, sample, slot="s", values=size).fitted
    assert most is not None
    assert math.log2(size) - 1e-9 <= most <= math.log2(size)
    assert str(exposure(-100.0, sample, slot="s", values=10**8).fitted) == "0.0"


def ill_shaped() -> Iterable[torch.Tensor]:
    yield torch.cat([draws(500), draws(500, seed=1) - 100])
    yield torch.full((1000,), -5.0, dtype=torch.float64)
    yield (draws(1000) / 4).round()
    yield draws(50)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("others", list(ill_shaped()), ids=["two heaps", "equal", "steps", "few"])
def test_a_poor_fit_is_not_believed(others: torch.Tensor) -> None:
    found = exposure(0.0, others, slot="s", values=10**6)
    assert found.poor_fit
    assert found.fitted == found.bits == math.log2(len(others) + 1)


# --- rows


def test_rows_go_by_copies_group_and_slot() -> None:
    def canary(copies: int, *, inserted: bool) -> Canary:
        return Canary("c", "note", "a", copies, "text", (), inserted)

    canaries = [
        canary(10, inserted=False),
        canary(1, inserted=True),
        canary(1, inserted=True),
        canary(1, inserted=True),
    ]
    found = [
        [SecretExposure("ward", 16, 16, 1.0)],
        [SecretExposure("ward", 16, 16, 4.0), SecretExposure("record", 10**8, 1001, 9.0, 20.0)],
        [SecretExposure("ward", 16, 16, 3.0), SecretExposure("record", 10**8, 1000, 8.0, 8.0, poor_fit=True)],
        [None],
    ]
    record, ward, control = exposure_rows("base", canaries, found)
    assert (record.model, record.copies, record.inserted, record.slot) == ("base", 1, True, "record")
    assert (record.values, record.compared, record.poor_fits) == (10**8, 1000, 1)
    assert record.exposure == mean([9.0, 8.0], bounds=(0, math.log2(10**8)))
    assert record.fitted == mean([20.0, 8.0], bounds=(0, math.log2(10**8)))
    assert (ward.slot, ward.values, ward.compared, ward.fitted, ward.poor_fits) == ("ward", 16, 16, None, 0)
    assert ward.exposure == mean([4.0, 3.0], bounds=(0, 4))
    assert (control.copies, control.inserted, control.exposure) == (10, False, mean([1.0]))
