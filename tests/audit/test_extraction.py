import math
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from allmend.audit.extraction import (
    APPROXIMATE,
    Continuation,
    continuations,
    extraction_rows,
    matched_tokens,
    token_bleu,
)
from allmend.audit.likelihood import Reading, read_texts
from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.intervals import mean, share

MakeTrained = Callable[..., LlamaForCausalLM]
EOS = 256


def read(model: torch.nn.Module, encoder: Encoder, texts: Sequence[str]) -> list[Reading]:
    return read_texts(model, [encoder.for_evaluation(Record(text, text=text)) for text in texts])


def generated(model: LlamaForCausalLM, ids: torch.Tensor, prefix: int) -> list[int]:
    """What `generate` makes of the beginning, up to an end token."""
    prompt = ids[None, :prefix]
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(ids) - prefix,
        do_sample=False,
        pad_token_id=EOS,
    )
    tokens = found[0, prefix:].tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def agreeing(tokens: Sequence[int], truth: Sequence[int]) -> int:
    matched = 0
    while matched < min(len(tokens), len(truth)) and tokens[matched] == truth[matched]:
        matched += 1
    return matched


@pytest.mark.parametrize("state", ["untouched", "halfway", "by heart"])
def test_one_pass_tells_what_generation_brings_out(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary], state: str
) -> None:
    model = models[state]
    readings = read(model, encoder, [canary.text for canary in canaries])
    seen = set()
    for prefix in range(1, max(len(reading.ids) for reading in readings), 4):
        long = [reading for reading in readings if len(reading.ids) > prefix]
        for reading, found in zip(long, continuations(model, long, prefix, end_token=EOS), strict=True):
            truth = reading.ids[prefix:].tolist()
            tokens = generated(model, reading.ids, prefix)
            matched = agreeing(tokens, truth)
            assert matched_tokens(reading, prefix) == matched
            assert found.matched == matched / len(truth)
            assert found.exact == (tokens == truth)
            assert found.bleu == pytest.approx(token_bleu(tokens, truth))
            seen.add((found.exact, 0 < found.matched < 1))
    expected = {"untouched": {(False, False)}, "halfway": {(False, False), (False, True), (True, False)}}
    assert seen >= expected.get(state, {(True, False)})


def test_a_text_known_by_heart_comes_from_every_prefix(
    tiny_model: LlamaForCausalLM, make_trained: MakeTrained, encoder: Encoder, canaries: list[Canary]
) -> None:
    text = canaries[0].text
    model = make_trained([text], 120)
    (known,), (unknown,) = read(model, encoder, [text]), read(tiny_model, encoder, [text])
    for prefix in range(1, len(known.ids)):
        (found,) = continuations(model, [known], prefix, end_token=EOS)
        assert found == Continuation(exact=True, matched=1.0, bleu=1.0)
        assert generated(model, known.ids, prefix) == known.ids[prefix:].tolist()
        (found,) = continuations(tiny_model, [unknown], prefix, end_token=EOS)
        assert not found.exact
        assert found.bleu < APPROXIMATE


def test_the_models_generation_settings_do_not_count(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    model = deepcopy(models["halfway"])
    readings = read(model, encoder, [canary.text for canary in canaries])
    expected = continuations(model, readings, 9, end_token=EOS)
    plain = generated(model, readings[0].ids, 9)
    model.generation_config.repetition_penalty = 5.0
    assert generated(model, readings[0].ids, 9) != plain
    assert continuations(model, readings, 9, end_token=EOS) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_neither_batches_nor_order_matter(make_trained: MakeTrained, encoder: Encoder, batch_size: int) -> None:
    learnt = ["abcabd", "rules are made of glass"]
    model = make_trained(learnt, 100)
    # the first text goes on where the model ends it
    readings = read(model, encoder, ["abcabdabcabdabc", learnt[1], "something else entirely"])
    expected = [continuations(model, [reading], 3, end_token=EOS)[0] for reading in readings]
    assert generated(model, readings[0].ids, 3) == readings[0].ids[3:6].tolist()
    assert expected[0].matched == 3 / 12
    told: list[int] = []
    found = continuations(model, readings, 3, end_token=EOS, batch_size=batch_size, on_tokens=told.append)
    assert found == expected
    assert continuations(model, readings[::-1], 3, end_token=EOS, batch_size=batch_size) == expected[::-1]
    assert sum(told) >= sum(len(reading.ids) - 3 for reading in readings)


def test_an_early_end_counts_against_a_continuation(make_trained: MakeTrained, encoder: Encoder) -> None:
    model = make_trained(["abcdefgh"], 100)
    (reading,) = read(model, encoder, ["abcdefghijklmnopqrst"])
    (found,) = continuations(model, [reading], 2, end_token=EOS)
    assert found.matched == 6 / 18
    assert found.bleu == pytest.approx(math.exp(1 - 18 / 6))  # brevity penalty alone: what is there is right


def bleu(tokens: Sequence[int], truth: Sequence[int]) -> float | None:
    """Papineni et al. 2002, or None where smoothing would be needed."""
    product = 1.0
    for n in range(1, 5):
        grams, others = (Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (tokens, truth))
        if not (grams & others):
            return None
        product *= (grams & others).total() / grams.total()
    return product**0.25 * min(1.0, math.exp(1 - len(truth) / len(tokens)))


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@given(TOKENS, TOKENS)
def test_bleu_is_that_of_papineni(tokens: list[int], truth: list[int]) -> None:
    found = token_bleu(tokens, truth)
    assert 0 <= found <= 1
    if (expected := bleu(tokens, truth)) is not None:
        assert found == pytest.approx(expected)


@given(st.lists(st.integers(0, 99999), min_size=1, max_size=30))
def test_bleu_of_equals_is_one(tokens: list[int]) -> None:
    assert token_bleu(tokens, tokens) == pytest.approx(1)
    assert token_bleu(tokens, tokens) <= 1
    assert token_bleu([], tokens) == 0
    if len(tokens) >= 4:
        assert token_bleu([*tokens[:-1], 100_000], tokens) < 1


def test_bleu_takes_tokens_as_wholes() -> None:
    assert token_bleu([1, 2, 3, 4], [12, 34, 1234, 123]) < 0.3


def test_rows_go_by_copies_and_group() -> None:
    def canary(copies: int, *, inserted: bool) -> Canary:
        return Canary("c", "note", "a", copies, "text", (), inserted)

    canaries = [canary(3, inserted=True), canary(1, inserted=True), canary(3, inserted=False), canary(3, inserted=True)]
    found = [
        Continuation(exact=True, matched=1.0, bleu=1.0),
        Continuation(exact=False, matched=0.5, bleu=APPROXIMATE),
        Continuation(exact=False, matched=0.0, bleu=0.1),
        Continuation(exact=False, matched=0.4, bleu=0.8),
    ]
    rows = {(row.copies, row.inserted): row for row in extraction_rows("base", canaries, found, 10)}
    assert set(rows) == {(1, True), (3, True), (3, False)}
    row = rows[3, True]
    assert (row.model, row.prefix_tokens) == ("base", 10)
    assert row.exact == share(1, 2)
    assert row.approximate == share(2, 2)
    assert row.matched == mean([1.0, 0.4], bounds=(0, 1))
    assert row.bleu == mean([1.0, 0.8], bounds=(0, 1))
    assert rows[1, True].approximate == share(0, 1)  # at the limit is not above it
    assert rows[3, False].exact == share(0, 1)
