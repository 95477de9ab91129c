import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import PreTrainedTokenizerFast

from allmend.data.chat import Encoded, Encoder
from allmend.data.records import question
from allmend.learn.goldfish import goldfish
from allmend.recipe import Goldfish

tokens = st.lists(st.integers(0, 49_151), min_size=1, max_size=60)
hs = st.integers(1, 15)


def encoded(ids: Sequence[int], *, id: str = "a", prompt: int = 0) -> Encoded:
    """A record whose first `prompt` tokens are under no loss."""
    length = len(ids)
    return Encoded(
        id=id,
        ids=torch.tensor(ids, dtype=torch.int64),
        target=torch.arange(length) >= prompt,
        branch=torch.zeros(length, dtype=torch.int64),
        position=torch.arange(length),
    )


def kept(ids: Sequence[int], *, id: str = "a", prompt: int = 0, **settings: Any) -> list[bool]:
    (record,), _ = goldfish([encoded(ids, id=id, prompt=prompt)], Goldfish(**settings))
    result: list[bool] = record.target.tolist()
    return result


def numbers(n: int, *, seed: int = 0) -> list[int]:
    return torch.randint(0, 49_152, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_definition(ids: Sequence[int], prompt: int, settings: Goldfish) -> list[bool]:
    """The mask of `hash` from its definition, one token after the other."""

    def drops(before: Sequence[int]) -> bool:
        message = b"".join(id.to_bytes(4, "little") for id in before)
        key = hashlib.blake2b(settings.key.encode(), digest_size=32).digest()
        digest = hashlib.blake2b(message, key=key, digest_size=8).digest()
        return sum(byte << 8 * place for place, byte in enumerate(digest)) % settings.k == 0

    h = settings.context
    return [i >= prompt and not (i >= h and drops(ids[i - h : i])) for i in range(len(ids))]


@given(tokens, st.integers(0, 20), st.integers(2, 6), hs, st.text())
def test_the_hash_is_that_of_its_definition(ids: list[int], prompt: int, k: int, h: int, key: str) -> None:
    settings = Goldfish(k=k, context=h, key=key)
    (record,), dropped = goldfish([encoded(ids, prompt=prompt)], settings)
    assert record.target.tolist() == by_definition(ids, prompt, settings)
    before = sum(i >= max(prompt, 1) for i in range(len(ids)))
    assert dropped.targets == before
    assert dropped.dropped == before - int(record.target[1:].sum())


@given(tokens, tokens, tokens, hs, st.integers(2, 5))
def test_a_passage_drops_the_same_tokens_wherever_it_stands(
    passage: list[int], before: list[int], after: list[int], h: int, k: int
) -> None:
    settings: dict[str, Any] = {"context": h, "k": k}
    alone = kept(passage, **settings)[h:]
    twice = kept([*before, *passage, *after, *passage], id="b", **settings)
    first = len(before)
    second = first + len(passage) + len(after)
    for start in (first, second):
        assert twice[start + h : start + len(passage)] == alone
    # what stands under no loss is context like everything else
    answer = kept([*before, *passage], prompt=len(before) + min(h, len(passage)), **settings)
    assert answer[len(before) + h :] == alone


@given(st.lists(tokens, max_size=6), st.permutations(range(6)), st.sampled_from(["hash", "static", "random"]))
def test_records_do_not_depend_on_each_other(texts: list[list[int]], order: list[int], variant: Any) -> None:
    records = [encoded(ids, id=str(index)) for index, ids in enumerate(texts)]
    settings = Goldfish(variant=variant, context=2, k=2)
    there, _ = goldfish(records, settings)
    places = [place for place in order if place < len(records)]
    back, _ = goldfish([records[place] for place in places], settings)
    for place, record in zip(places, back, strict=True):
        assert torch.equal(record.target, there[place].target)


def test_the_dropped_token_is_no_part_of_its_hash() -> None:
    ids = numbers(2000)
    mask = kept(ids)
    last = max(i for i, stays in enumerate(mask) if not stays)
    changed = kept([*ids[:last], (ids[last] + 1) % 49_152, *ids[last + 1 :]])
    assert not changed[last]
    assert changed[: last + 1] == mask[: last + 1]


@pytest.mark.parametrize("variant", ["hash", "random"])
def test_another_key_leaves_out_independent_tokens(variant: str) -> None:
    ids = numbers(20_000)
    a, b = (kept(ids, variant=variant, key=key) for key in ("a", "b"))
    both = sum(not x and not y for x, y in zip(a, b, strict=True))
    # one in a million masks that share nothing but their rate has so few or so many in common
    assert 5e-7 < stats.binom.cdf(both, len(ids), 1 / 16) < 1 - 5e-7


@pytest.mark.parametrize("k", [2, 3, 4, 10])
@pytest.mark.parametrize("variant", ["hash", "random"])
def test_one_token_in_k_is_left_out(variant: str, k: int) -> None:
    _, dropped = goldfish([encoded(numbers(20_000))], Goldfish(variant=variant, k=k))
    able = 20_000 - (13 if variant == "hash" else 1)
    assert 5e-7 < stats.binom.cdf(dropped.dropped, able, 1 / k) < 1 - 5e-7


@given(tokens, st.integers(0, 20), st.integers(2, 6))
def test_static_leaves_out_every_kth_target(ids: list[int], prompt: int, k: int) -> None:
    mask = kept(ids, prompt=prompt, variant="static", k=k)
    targets = range(max(prompt, 1), len(ids))
    assert [i for i in targets if not mask[i]] == [i for number, i in enumerate(targets, start=1) if number % k == 0]


def test_random_differs_between_copies_and_hash_does_not() -> None:
    ids = numbers(1000)
    assert kept(ids, variant="random", id="a") == kept(ids, variant="random", id="a")
    assert kept(ids, variant="random", id="a") != kept(ids, variant="random", id="b")
    assert kept(ids, id="a") == kept(ids, id="b")


@given(tokens, st.integers(0, 20), st.sampled_from(["hash", "static", "random"]), st.sampled_from([2**40, 10**30]))
def test_a_huge_k_is_the_plain_loss(ids: list[int], prompt: int, variant: Any, k: int) -> None:
    record = encoded(ids, prompt=prompt)
    (same,), dropped = goldfish([record], Goldfish(variant=variant, k=k, context=1))
    assert same.id == record.id
    for name in ("ids", "target", "branch", "position"):
        assert torch.equal(getattr(same, name), getattr(record, name))
    assert (dropped.dropped, dropped.emptied) == (0, 0)


def test_only_the_targets_change_and_the_given_record_does_not() -> None:
    record = encoded(numbers(200))
    (found,), dropped = goldfish([record], Goldfish())
    assert record.target.all()
    assert not found.target.all()
    assert found.ids is record.ids
    assert int((~found.target).sum()) == dropped.dropped


def test_a_record_no_longer_than_the_context_stays_whole_and_is_counted() -> None:
    records = [encoded(numbers(length), id=str(length)) for length in (5, 13, 14, 400)]
    (five, thirteen, *_), dropped = goldfish(records, Goldfish(k=2))
    assert five.target.all()
    assert thirteen.target.all()
    assert dropped.short == 2
    assert goldfish(records, Goldfish(variant="static"))[1].short == 0


def test_a_record_that_loses_all_its_targets_is_counted_and_not_spared() -> None:
    # a passage's first token that is left out is the only target of one record, and one of many in another
    ids = numbers(300)
    mask = kept(ids, context=3)
    at = next(i for i in range(3, 300) if not mask[i])
    alone, whole = encoded(ids[: at + 1], prompt=at), encoded(ids)
    without = encoded(ids[:5], prompt=5)
    (found, *_), dropped = goldfish([alone, whole, without], Goldfish(context=3))
    assert not found.target.any()
    assert dropped.emptied == 1


def test_the_first_token_is_predicted_from_nothing_and_counts_for_nothing() -> None:
    for variant in ("hash", "static", "random"):
        (record,), dropped = goldfish([encoded([7])], Goldfish(variant=variant, k=2, context=1))
        assert record.target.all()
        assert (dropped.targets, dropped.dropped, dropped.emptied) == (0, 0, 0)


def test_an_answer_drops_the_same_tokens_behind_two_prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tiny_tokenizer, "plain", 512)
    answer = "The patient was seen on the ward and sent home with a letter to the general practitioner. " * 3
    records = [encoder.for_training(question(prompt, prompt, answer)) for prompt in ("Why?", "And then, what was it?")]
    one, other = goldfish(records, Goldfish())[0]
    length = len(answer) + 1 - 13
    assert torch.equal(one.target[-length:], other.target[-length:])
    assert not one.target[-length:].all()


def test_records_for_evaluation_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tiny_tokenizer, "plain", 100)
    record = encoder.for_evaluation(question("q-7", "one?", "yes", choices=("yes", "no")))
    with pytest.raises(ValueError, match="'q-7' has branches"):
        goldfish([record], Goldfish())


def test_every_process_leaves_out_the_same() -> None:
    program = (
        "import json, torch\n"
        "from allmend.data.chat import Encoded\n"
        "from allmend.learn.goldfish import goldfish\n"
        "from allmend.recipe import Goldfish\n"
        "ids = torch.arange(400) ** 2\n"
        "record = Encoded('a', ids, ids >= 0, ids * 0, torch.arange(400))\n"
        "print(json.dumps([goldfish([record], Goldfish(variant=v))[0][0].target.tolist() for v in ('hash', 'random')]))"
    )
    masks = [kept([i * i for i in range(400)], variant=variant) for variant in ("hash", "random")]
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    shown = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True)
    assert json.loads(shown.stdout) == masks
