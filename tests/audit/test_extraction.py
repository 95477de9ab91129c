import math
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.audit.discoverable import log_probability
from allmend.audit.extraction import (
    APPROXIMATE,
    Continuation,
    Prefix,
    Secret,
    continuations,
    exact_matches,
    extraction_rows,
    locate_secrets,
    token_bleu,
)
from allmend.audit.likelihood import Reading, read_texts
from allmend.data.canaries import Canary, SecretSpan
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.intervals import mean, share

LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
MakeTrained = Callable[..., LlamaForCausalLM]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
EOS = 256
PREFIXES = [Prefix(tokens=1), Prefix(tokens=9), Prefix(tokens=32), *(Prefix(share=part) for part in (0.1, 0.5, 0.9))]


def read(model: torch.nn.Module, encoder: Encoder, texts: Sequence[str]) -> list[Reading]:
    return read_texts(model, [encoder.for_evaluation(Record(text, text=text)) for text in texts])


def secret(text: str, value: str, slot: str = "s") -> Secret:
    """Bytes are tokens."""
    start = text.index(value)
    return Secret(slot, value, start, start + len(value))


def bring_out(
    model: torch.nn.Module,
    encoder: Encoder,
    readings: Sequence[Reading],
    prefix: Prefix,
    *,
    secrets: Sequence[Sequence[Secret]] | None = None,
    suffix_tokens: int | None = None,
    batch_size: int = 64,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[Continuation | None]:
    return continuations(
        model,
        readings,
        prefix,
        secrets=secrets or [()] * len(readings),
        tokenizer=encoder.tokenizer,
        suffix_tokens=suffix_tokens,
        batch_size=batch_size,
        on_tokens=on_tokens,
    )


def generated(model: LlamaForCausalLM, ids: torch.Tensor, part: range) -> list[int]:
    """What `generate` makes of what stands before a part of a text, alone, up to an end token."""
    prompt = ids[None, : part.start]
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(part),
        do_sample=False,
        pad_token_id=EOS,
    )
    tokens = found[0, part.start :].tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def agreeing(tokens: Sequence[int], truth: Sequence[int]) -> int:
    matched = 0
    while matched < min(len(tokens), len(truth)) and tokens[matched] == truth[matched]:
        matched += 1
    return matched


@pytest.mark.parametrize("state", ["untouched", "halfway", "by heart"])
@pytest.mark.parametrize("suffix_tokens", [None, 7])
def test_continuations_are_those_of_generate(
    models: dict[str, LlamaForCausalLM],
    encoder: Encoder,
    canaries: list[Canary],
    state: str,
    suffix_tokens: int | None,
) -> None:
    model = models[state]
    texts = [canary.text for canary in canaries]
    readings = read(model, encoder, texts)
    secrets = [[secret(text, word.strip(",:"), word) for word in text.split()] for text in texts]
    seen, brought = set(), set()
    for prefix in PREFIXES:
        found = bring_out(model, encoder, readings, prefix, secrets=secrets, suffix_tokens=suffix_tokens)
        assert [one and one.exact for one in found] == exact_matches(readings, prefix, suffix_tokens=suffix_tokens)
        for one, reading, text, own in zip(found, readings, texts, secrets, strict=True):
            part = prefix.behind(len(reading.ids), suffix_tokens)
            if one is None:
                assert not part
                continue
            truth = reading.ids[part.start : part.stop].tolist()
            tokens = generated(model, reading.ids, part)
            assert one.prefix_tokens == part.start
            assert one.text == encoder.tokenizer.decode(tokens)
            assert one.matched == agreeing(tokens, truth) / len(truth)
            assert one.exact == (tokens == truth)
            assert one.bleu == pytest.approx(token_bleu(tokens, truth))
            inside = [s for s in own if text.index(s.value) >= part.start and s.last <= part.stop]
            assert [slot for slot, _ in one.secrets] == [s.slot for s in inside]
            for (_, reproduced), s in zip(one.secrets, inside, strict=True):
                words = one.text.replace(",", " ").replace(":", " ").split()
                if words and s.value not in (words[0], words[-1]):  # which may be pieces of words
                    assert reproduced == (s.value in words)
                brought.add(reproduced)
            seen.add((one.exact, 0 < one.matched < 1))
    expected = {"untouched": {(False, False)}, "halfway": {(False, False), (False, True), (True, False)}}
    assert seen >= expected.get(state, {(True, False)})
    assert brought == ({False} if state == "untouched" else {False, True})


def test_a_text_known_by_heart_comes_from_every_prefix(
    tiny_model: LlamaForCausalLM, make_trained: MakeTrained, encoder: Encoder, canaries: list[Canary]
) -> None:
    text = canaries[0].text
    own = [secret(text, "Okafor"), secret(text, "40917")]
    model = make_trained([text], 120)
    (known,), (unknown,) = read(model, encoder, [text]), read(tiny_model, encoder, [text])
    for tokens in range(1, len(known.ids), 3):
        prefix = Prefix(tokens=tokens)
        (found,) = bring_out(model, encoder, [known], prefix, secrets=[own])
        behind = tuple(("s", True) for one in own if one.first >= tokens)
        assert found == Continuation(tokens, exact=True, matched=1.0, bleu=1.0, secrets=behind, text=text[tokens:])
        assert generated(model, known.ids, prefix.behind(len(text))) == known.ids[tokens:].tolist()
        (found,) = bring_out(tiny_model, encoder, [unknown], prefix, secrets=[own])
        assert found is not None
        assert not found.exact
        assert found.bleu < APPROXIMATE
        assert not any(reproduced for _, reproduced in found.secrets)


def test_the_models_generation_settings_do_not_count(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    model = deepcopy(models["halfway"])
    readings = read(model, encoder, [canary.text for canary in canaries])
    expected = bring_out(model, encoder, readings, Prefix(tokens=9))
    part = Prefix(tokens=9).behind(len(readings[0].ids))
    plain = generated(model, readings[0].ids, part)
    model.generation_config.repetition_penalty = 5.0
    assert generated(model, readings[0].ids, part) != plain
    assert bring_out(model, encoder, readings, Prefix(tokens=9)) == expected


@pytest.fixture(scope="module")
def two_learnt(make_trained: MakeTrained) -> LlamaForCausalLM:
    return make_trained(["abcabd", "rules are made of glass"], 100)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("prefix", [Prefix(tokens=3), Prefix(share=0.3)])
def test_neither_batches_nor_order_matter(
    two_learnt: LlamaForCausalLM, encoder: Encoder, batch_size: int, prefix: Prefix
) -> None:
    model = two_learnt
    # the first text goes on where the model ends it, the third is left at its second half
    texts = ["abcabdabcabdabc", "rules are made of glass", "rules are not made of wood, or some", "ab"]
    readings = read(model, encoder, texts)
    expected = [bring_out(model, encoder, [reading], prefix)[0] for reading in readings]
    assert generated(model, readings[0].ids, range(3, 15)) == readings[0].ids[3:6].tolist()
    told: list[int] = []
    found = bring_out(model, encoder, readings, prefix, batch_size=batch_size, on_tokens=told.append)
    assert found == expected
    assert exact_matches(readings, prefix)[:3] == [False, True, False]
    assert found[2] is not None
    assert len(found[2].text) > 10
    assert (found[3] is None) == (prefix.tokens == 3)
    assert bring_out(model, encoder, readings[::-1], prefix, batch_size=batch_size) == expected[::-1]
    assert sum(told) == sum(len(prefix.behind(len(reading.ids))) for reading in readings)


def test_padding_does_not_move_positions(encoder: Encoder) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=EOS)
        model = GPT2LMHeadModel(config).eval()
    model.transformer.wpe.weight.data.mul_(20)  # learned positions, which relative ones cannot stand in for
    readings = read(model, encoder, ["a long text of some fifty letters, more or less, it is", "a short one", "and"])
    found = bring_out(model, encoder, readings, Prefix(share=0.5))
    assert found == [bring_out(model, encoder, [reading], Prefix(share=0.5))[0] for reading in readings]
    assert len({one.text for one in found if one}) == 3


def test_only_what_readings_do_not_tell_is_generated(
    make_trained: MakeTrained, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_trained(["abcdefgh", "12345678"], 100)
    exact, ended, *_ = readings = read(model, encoder, ["abcdefgh", "abcdefgh and more", "1234567 or so", "1234567x"])
    passes: list[tuple[int, int]] = []
    forward = model.forward

    def counted(**inputs: torch.Tensor) -> object:
        passes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counted)
    assert exact_matches(readings, Prefix(tokens=2)) == [True, False, False, False]
    bring_out(model, encoder, [exact], Prefix(tokens=2))
    assert passes == []
    bring_out(model, encoder, [exact, ended], Prefix(tokens=2))
    assert passes == [(1, 8)]  # the first token that is not the text's ends it
    passes.clear()
    bring_out(model, encoder, readings, Prefix(tokens=2))
    assert passes == [(3, 8), (3, 1)]  # `8` and the end
    passes.clear()
    bring_out(model, encoder, readings[2:3], Prefix(tokens=2), suffix_tokens=6)
    assert passes == [(1, 7)]  # the one token that is asked for


def test_an_early_end_counts_against_a_continuation(make_trained: MakeTrained, encoder: Encoder) -> None:
    model = make_trained(["abcdefgh"], 100)
    (reading,) = read(model, encoder, ["abcdefghijklmnopqrst"])
    own = [secret("abcdefghijklmnopqrst", value) for value in ("ef", "hi", "op")]
    (found,) = bring_out(model, encoder, [reading], Prefix(tokens=2), secrets=[own])
    assert found is not None
    assert found.matched == 6 / 18
    assert found.bleu == pytest.approx(math.exp(1 - 18 / 6))  # brevity penalty alone: what is there is right
    assert found.secrets == (("s", True), ("s", False), ("s", False))
    assert found.text == "cdefgh"


def test_a_secret_may_come_out_anywhere_as_words_of_its_own(make_trained: MakeTrained, encoder: Encoder) -> None:
    model = make_trained(["Ward: not 12C, Ada"], 120)
    text = "Ward: 12C or 2C, Ad, Ada no"
    own = [secret(text, value, value) for value in ("12C", " 2C", "Ad", "Ada", "no")]
    own[1] = replace(own[1], value="2C", first=own[1].first + 1)
    (found,) = bring_out(model, encoder, read(model, encoder, [text]), Prefix(tokens=6), secrets=[own])
    assert found is not None
    assert found.text == "not 12C, Ada"
    assert dict(found.secrets) == {"12C": True, " 2C": False, "Ad": False, "Ada": True, "no": False}


def test_secrets_are_judged_where_they_lie_wholly_in_what_is_brought_out(
    models: dict[str, LlamaForCausalLM], encoder: Encoder, canaries: list[Canary]
) -> None:
    text = canaries[0].text
    readings = read(models["by heart"], encoder, [text])
    one = secret(text, "Okafor")
    for start, suffix, judged in (
        (one.first, None, True),
        (one.first + 1, None, False),
        (one.first - 2, 8, True),
        (one.first - 2, 7, False),
    ):
        (found,) = bring_out(
            models["by heart"], encoder, readings, Prefix(tokens=start), secrets=[[one]], suffix_tokens=suffix
        )
        assert found is not None
        assert found.secrets == ((("s", True),) if judged else ())


def test_a_tokenizer_that_changes_the_text_hides_no_secret(
    make_tiny_tokenizer: MakeTokenizer, tiny_model: LlamaForCausalLM
) -> None:
    tokenizer = make_tiny_tokenizer(merges=["an"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    text = "Ward 3: Tamar Okafor"
    spans = tuple(SecretSpan(text.index(value), text.index(value) + len(value), "n", 1.0) for value in ("3", "Okafor"))
    encoded, secrets = locate_secrets(
        Encoder(tokenizer, "plain", 5), Canary("c", "note", "a", 1, text, spans, inserted=True)
    )
    assert [(one.value, tokenizer.decode(encoded.ids[one.first : one.last])) for one in secrets] == [
        ("3", "3"),
        ("Okafor", "okafor"),
    ]
    (reading,) = read_texts(tiny_model, [encoded])
    known = replace(reading, hit=torch.ones_like(reading.hit))
    (found,) = continuations(tiny_model, [known], Prefix(tokens=2), secrets=[secrets], tokenizer=tokenizer)
    assert found is not None
    assert found.secrets == (("n", True), ("n", True))


def test_several_special_tokens_before_a_text_shift_nothing(
    make_tiny_tokenizer: MakeTokenizer, tiny_model: LlamaForCausalLM, log_probs: LogProbs
) -> None:
    special = ("[gMASK]", "<sop>")
    tokenizer = make_tiny_tokenizer(special=("<eos>", *special))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in special]
    )
    text = "Ward 3: Tamar Okafor"
    encoded, _ = locate_secrets(Encoder(tokenizer, "plain", 99), Canary("c", "note", "a", 1, text, (), True))
    assert len(encoded) == len(special) + len(text)
    (reading,) = read_texts(tiny_model, [encoded])
    with torch.no_grad():
        expected = log_probs(tiny_model, encoded.ids).double()
    assert reading.log_likelihood.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    known = replace(reading, hit=torch.ones_like(reading.hit))
    for prefix in (Prefix(tokens=3), Prefix(tokens=10), Prefix(share=0.5)):
        assert exact_matches([known], prefix) == [True]
        part = prefix.behind(len(encoded))
        of_part = expected[part.start - 1 : part.stop - 1].sum().item()
        assert log_probability(reading, part) == pytest.approx(of_part, abs=1e-4)


def test_spaces_before_punctuation_stay(make_tiny_tokenizer: MakeTokenizer, tiny_model: LlamaForCausalLM) -> None:
    tokenizer = make_tiny_tokenizer(
        clean_up_tokenization_spaces=True, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True
    )
    text = "room 7 . 2 , bed 1"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == "room 7. 2, bed 1"
    (reading,) = read(tiny_model, Encoder(tokenizer, "plain", 50), [text])
    known = replace(reading, hit=torch.ones_like(reading.hit))
    (found,) = continuations(tiny_model, [known], Prefix(tokens=5), secrets=[()], tokenizer=tokenizer)
    assert found is not None
    assert found.text == "7 . 2 , bed 1"


@given(st.integers(0, 200), st.integers(1, 90), st.integers(1, 99), st.none() | st.integers(1, 60))
def test_a_prefix_and_what_stands_behind_it(total: int, tokens: int, percent: int, suffix: int | None) -> None:
    part = Prefix(tokens=tokens).behind(total, suffix)
    assert list(part) == list(range(total))[tokens:][:suffix]
    part = Prefix(share=percent / 100).behind(total, suffix)
    if total < 2:
        assert not part
        return
    assert len(part) == min(total - part.start, total if suffix is None else suffix)
    assert abs(part.start - total * percent / 100) <= 0.5 or part.start in (1, total - 1)
    assert 1 <= part.start < total


def test_prefixes_in_words() -> None:
    labels = [Prefix(tokens=20).label, Prefix(share=0.5).label, Prefix(share=0.29).label, Prefix(share=0.125).label]
    assert labels == ["20 tokens", "50 %", "29 %", "12.5 %"]


@pytest.mark.parametrize(
    ("tokens", "part"), [(0, 0.0), (5, 0.5), (-1, 0.0), (0, 1.0), (0, -0.1), (-1, 0.5), (0, math.nan)]
)
def test_what_is_no_prefix(tokens: int, part: float) -> None:
    with pytest.raises(ValueError, match="no beginning"):
        Prefix(tokens=tokens, share=part)


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

    def continuation(tokens: int, matched: float, bleu: float, *secrets: tuple[str, bool]) -> Continuation:
        return Continuation(tokens, matched == 1, matched, bleu, secrets, "")

    canaries = [
        canary(3, inserted=True),
        canary(1, inserted=True),
        canary(3, inserted=False),
        canary(3, inserted=True),
        canary(3, inserted=True),
        canary(10, inserted=False),
    ]
    found = [
        continuation(10, 1.0, 1.0, ("name", True), ("ward", True), ("name", True)),
        continuation(20, 0.5, APPROXIMATE),
        continuation(30, 0.0, 0.1, ("ward", False)),
        continuation(12, 0.4, 0.8, ("name", False)),
        None,
        None,
    ]
    rows = {(row.copies, row.inserted): row for row in extraction_rows("base", canaries, found, Prefix(share=0.25))}
    assert set(rows) == {(1, True), (3, True), (3, False)}
    row = rows[3, True]
    assert (row.model, row.prefix, row.prefix_tokens) == ("base", "25 %", 11)
    assert row.exact == share(1, 2)
    assert row.approximate == share(2, 2)
    assert row.matched == mean([1.0, 0.4], bounds=(0, 1))
    assert row.bleu == mean([1.0, 0.8], bounds=(0, 1))
    assert row.secrets == {"": mean([1.0, 0.0], bounds=(0, 1)), "name": share(2, 3), "ward": share(1, 1)}
    assert rows[1, True].approximate == share(0, 1)  # at the limit is not above it
    assert rows[1, True].secrets == {}
    assert rows[3, False].exact == share(0, 1)
    assert rows[3, False].secrets == {"": share(0, 1), "ward": share(0, 1)}


@pytest.mark.parametrize("out", [False, True])
def test_secrets_that_all_come_out_or_none_have_the_interval_of_as_many_texts(out: bool) -> None:
    canaries = [Canary(str(i), "note", "a", 1, "text", (), True) for i in range(8)]
    found = [Continuation(10, False, 0.1, 0.1, (("name", out), ("ward", out)), "") for _ in canaries]
    (row,) = extraction_rows("base", canaries, found, Prefix(tokens=10))
    assert row.secrets == {"": share(8 * out, 8), "name": share(8 * out, 8), "ward": share(8 * out, 8)}
