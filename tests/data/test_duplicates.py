import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import PreTrainedTokenizerFast

from allmend.data import duplicates as module
from allmend.data.chat import Encoded, Encoder
from allmend.data.duplicates import without_duplicates
from allmend.data.records import Record

similarities = st.floats(0.1, 0.95)


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


def kept(texts: Sequence[Sequence[int]], similarity: float) -> list[int]:
    """Indices of the texts that stay."""
    records, counts = without_duplicates(
        [encoded(ids, id=str(index)) for index, ids in enumerate(texts)], similarity=similarity
    )
    assert counts.exact + counts.near == len(texts) - len(records)
    return [int(record.id) for record in records]


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """From its definition, on tuples."""
    x, y = ({tuple(ids[i : i + 5]) for i in range(max(1, len(ids) - 4))} for ids in (a, b))
    return len(x & y) / len(x | y)


def by_brute_force(texts: Sequence[Sequence[int]], similarity: float) -> list[int]:
    stay: list[int] = []
    for index, ids in enumerate(texts):
        if all(jaccard(ids, texts[other]) < similarity for other in stay):
            stay.append(index)
    return stay


def numbers(n: int, *, seed: int) -> list[int]:
    return torch.randint(0, 49_152, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    """Texts that are made from a few by changing, cutting and joining, so that all degrees of similarity occur."""
    seeds = draw(st.lists(st.lists(st.integers(0, 49_151), max_size=30), min_size=1, max_size=3))
    texts = []
    for _ in range(draw(st.integers(0, 12))):
        text = [*draw(st.sampled_from(seeds)), *draw(st.sampled_from([[], *seeds]))]
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(text)))
            text[at : at + draw(st.integers(0, 2))] = draw(st.lists(st.integers(0, 3), max_size=2))
        texts.append(text)
    return texts


# a pair is missed once in ten thousand times at most: examples that are the same in every run
@settings(max_examples=100, deadline=None, derandomize=True)
@given(families(), similarities)
def test_it_is_brute_force_on_small_sets(texts: list[list[int]], similarity: float) -> None:
    assert kept(texts, similarity) == by_brute_force(texts, similarity)


@settings(max_examples=30, deadline=None)
@given(families(), similarities)
def test_nothing_is_left_out_below_the_bound_and_a_second_time_leaves_out_nothing(
    texts: list[list[int]], similarity: float
) -> None:
    stay = kept(texts, similarity)
    assert stay == sorted(stay)
    for index in set(range(len(texts))) - set(stay):
        assert max(jaccard(texts[index], texts[other]) for other in stay if other < index) >= similarity
    assert kept([texts[index] for index in stay], similarity) == list(range(len(stay)))


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.95])
def test_pairs_at_the_bound_are_found(similarity: float) -> None:
    # n grams alone on either side of m in common: m / (m + 2 n) is `similarity` exactly
    alone = 20
    common = round(2 * alone * similarity / (1 - similarity))
    texts = []
    for pair in range(200):
        shared, *ends = (numbers(n, seed=3 * pair + part) for part, n in enumerate((common + 4, alone, alone)))
        texts += [[*shared, *end] for end in ends]
        assert jaccard(*texts[-2:]) == pytest.approx(similarity)
        assert jaccard(*texts[-2:]) == common / (common + 2 * alone)
    bound = common / (common + 2 * alone)
    # at a chance of 1e-4 each, one of two hundred is missed in 2 % of such tests and two in 0.02 %
    assert len(kept(texts, bound)) <= 201
    assert len(kept(texts, bound + 1e-9)) == 400


@given(st.floats(0.07, 1, exclude_max=True))
def test_bands_miss_a_pair_at_the_bound_once_in_ten_thousand_times(similarity: float) -> None:
    bands, rows = module._bands(similarity)
    assert bands >= 2
    assert bands * rows <= module._PERMUTATIONS
    assert (1 - similarity**rows) ** bands <= 1e-4


def faint_pairs(pairs: int) -> list[list[int]]:
    """Pairs of texts with an index of 0.01, and of 0 to those of other pairs."""
    texts = []
    for pair in range(pairs):
        shared, *ends = (numbers(n, seed=3 * pair + part) for part, n in enumerate((12, 396, 396)))
        texts += [[*shared, *end] for end in ends]
    return texts


def test_below_the_promise_pairs_are_missed_as_often_as_ideal_hashing_misses_them() -> None:
    texts = faint_pairs(100)
    assert jaccard(*texts[:2]) == 0.01
    missed = len(kept(texts, 0.01)) - 100
    assert 5e-7 < stats.binom.cdf(missed, 100, 0.99**128) < 1 - 5e-7


@pytest.mark.parametrize("similarity", [0.3, 1.0])
def test_equal_records_are_exact_duplicates(similarity: float) -> None:
    a, b = numbers(30, seed=0), numbers(30, seed=1)
    records = [encoded(ids, id=str(index)) for index, ids in enumerate([a, b, a, a, b, [], [], a[:3], a[:3]])]
    stay, counts = without_duplicates(records, similarity=similarity)
    assert [record.id for record in stay] == ["0", "1", "5", "7"]
    assert (counts.exact, counts.near) == (5, 0)
    assert stay[0] is records[0]


def test_targets_make_a_difference_to_equality_and_none_to_similarity() -> None:
    records = [encoded(numbers(30, seed=0), id=str(prompt), prompt=prompt) for prompt in (0, 7)]
    stay, counts = without_duplicates(records, similarity=1.0)
    assert (len(stay), counts.exact, counts.near) == (2, 0, 0)
    stay, counts = without_duplicates(records, similarity=0.99999999)
    assert (len(stay), counts.exact, counts.near) == (1, 0, 1)


def test_records_shorter_than_a_gram_are_compared_whole() -> None:
    texts = [[1, 2], [1, 2, 3], [1, 2, 3, 4], [2, 1], [1, 2, 3, 4, 5], [1, 2, 3, 4, 0], [0, 1, 2, 3, 4], [], [1, 2]]
    assert kept(texts, 0.1) == list(range(8))


def test_two_grams_have_the_same_number_when_they_are_the_same() -> None:
    texts = [text for length in range(7) for text in itertools.product((0, 1), repeat=length)]
    grams = [{text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in texts]
    found = module._grams([np.array(text, dtype=np.int64) for text in texts])
    for (a, x), (b, y) in itertools.product(zip(grams, found, strict=True), repeat=2):
        assert len(a & b) == len(np.intersect1d(x, y))


def test_the_first_of_each_group_stays_and_similarity_is_to_what_is_kept() -> None:
    # each is similar to its neighbours alone: the second goes with the first, and the third is like no other that stays
    chain = numbers(140, seed=0)
    texts = [chain[:100], chain[20:120], chain[40:140]]
    assert jaccard(texts[0], texts[1]) == jaccard(texts[1], texts[2]) > 0.6 > jaccard(texts[0], texts[2])
    assert kept(texts, 0.6) == [0, 2]
    assert kept([texts[1], texts[0], texts[2]], 0.6) == [0]


def test_copies_of_canaries_become_one_and_other_canaries_stay(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tiny_tokenizer, "plain", 512)
    note = "Ward {}: {}, born {} May 19{}, record number {}, is treated for {} and will be seen again in {}."
    people = [
        (3, "Ngozi Wallin", 17, 48, 48210937, "gallstones", "March"),
        (12, "Emilia Traore", 2, 71, 90017254, "sciatica", "October"),
        (7, "Lars Okafor", 29, 66, 31175208, "otitis media", "June"),
    ]
    texts = [note.format(*person) for person in people for _ in range(10)]
    # a copy with other white space or a slip is a copy
    texts[5], texts[17] = texts[5].replace("is treated", "is  treated"), texts[17].replace("again", "agian")
    records = [encoder.for_training(Record(f"{index}", text=text)) for index, text in enumerate(texts)]
    stay, counts = without_duplicates(records, similarity=0.8)
    assert [record.id for record in stay] == ["0", "10", "20"]
    assert (counts.exact, counts.near) == (25, 2)
    assert len(without_duplicates(records, similarity=1.0)[0]) == 5


@pytest.mark.parametrize("similarity", [0.0, -0.1, 1.1, float("nan")])
def test_a_similarity_that_is_none_is_refused(similarity: float) -> None:
    with pytest.raises(ValueError, match="similarity"):
        without_duplicates([], similarity=similarity)


def test_no_records_have_no_duplicates() -> None:
    assert without_duplicates([], similarity=0.5) == ([], module.Duplicates(0, 0))


def test_every_process_leaves_out_the_same() -> None:
    program = (
        "import json, sys, torch\n"
        "from allmend.data.chat import Encoded\n"
        "from allmend.data.duplicates import without_duplicates\n"
        "ids = [torch.tensor(text) for text in json.load(sys.stdin)]\n"
        "records = [Encoded(str(i), x, x >= 0, x * 0, torch.arange(len(x))) for i, x in enumerate(ids)]\n"
        "print(json.dumps([int(record.id) for record in without_duplicates(records, similarity=0.01)[0]]))"
    )
    texts = faint_pairs(50)
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        input=json.dumps(texts),
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(shown.stdout) == kept(texts, 0.01)
