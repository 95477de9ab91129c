import calendar
import math
import random
from collections import Counter
from datetime import date, timedelta
from string import Formatter

import pytest
from scipy.stats import chisquare

from allmend import UserError
from allmend.data.canary_kinds import KINDS, number_of_values, possible_values, random_values
from allmend.recipe import Canaries

SLOTS = [(kind, slot) for kind in KINDS for slot in KINDS[kind].slots]
SMALL = [(kind, slot) for kind, slot in SLOTS if KINDS[kind].slots[slot].size <= 400]
MONTHS = calendar.month_name[1:]


class Fixed(random.Random):
    """Gives one number for ever."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def days(first: date, last: date) -> list[date]:
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


def values(kind: str, slot: str) -> list[str]:
    found = possible_values(kind, slot, limit=10**6)
    assert found is not None
    return found


def test_the_recipe_allows_exactly_these_kinds() -> None:
    assert Canaries.model_json_schema()["properties"]["kinds"]["items"]["enum"] == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_template_holds_every_secret_once_and_ends_with_one_of_many(kind: str) -> None:
    assert len(set(KINDS[kind].templates)) >= 4
    for template in KINDS[kind].templates:
        *parts, (full_stop, nothing, _, _) = Formatter().parse(template)
        assert (full_stop, nothing) == (".", None)
        names = [name for _, name, _, _ in parts]
        assert sorted(map(str, names)) == sorted(KINDS[kind].slots)
        assert KINDS[kind].slots[str(names[-1])].size >= 365


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_secrets_to_rank_and_one_to_look_for(kind: str) -> None:
    sizes = [slot.size for slot in KINDS[kind].slots.values()]
    assert sum(size <= 400 for size in sizes) >= 2
    assert max(sizes) >= 2**20


def test_no_two_kinds_have_a_slot_of_the_same_name() -> None:
    assert max(Counter(slot for _, slot in SLOTS).values()) == 1


@pytest.mark.parametrize(
    ("kind", "slot", "expected"),
    [
        ("clinical-note", "ward", {f"{n}{wing}" for n in range(1, 25) for wing in "ABCDEF"}),
        (
            "clinical-note",
            "review",
            {f"{d.day} {MONTHS[d.month - 1]}" for d in days(date(2023, 1, 1), date(2023, 12, 31))},
        ),
        (
            "clinical-note",
            "born",
            {
                f"{d.day} {MONTHS[d.month - 1]} {d.year}"
                for d in days(date(1930, 1, 1), date(2009, 12, 31))
                if (d.day, d.month) != (29, 2)
            },
        ),
        ("contract", "fee", {f"CHF {n:,}" for n in range(10_000, 100_000, 10)}),
        ("contract", "term", {f"{n} months" for n in range(6, 66)}),
        ("credential", "expiry", {f"{month} {year}" for month in MONTHS for year in range(2027, 2037)}),
        ("credential", "pin", {f"{n:04d}" for n in range(10_000)}),
    ],
)
def test_values_are_those_that_the_words_say(kind: str, slot: str, expected: set[str]) -> None:
    found = values(kind, slot)
    assert set(found) == expected
    assert number_of_values(kind, slot) == len(found) == len(expected)


@pytest.mark.parametrize(
    ("kind", "slot", "number", "last"),
    [
        ("clinical-note", "record", 10**8, "99999999"),
        ("letter", "phone", 10**8, "079 999 99 99"),
        ("contract", "number", 10**8, "9999-9999"),
        ("credential", "token", 16**10, "ffffffffff"),
    ],
)
def test_numbers_of_values_too_many_to_list(kind: str, slot: str, number: int, last: str) -> None:
    assert number_of_values(kind, slot) == number
    assert possible_values(kind, slot, limit=10**6) is None
    assert KINDS[kind].slots[slot].value(number - 1) == last


@pytest.mark.parametrize(("kind", "slot"), SLOTS)
def test_no_value_has_two_numbers(kind: str, slot: str) -> None:
    found = KINDS[kind].slots[slot]
    indices = {*range(min(found.size, 20_000)), *range(0, found.size, max(1, found.size // 20_000))}
    assert len({found.value(index) for index in indices}) == len(indices)
    assert found.bits == math.log2(number_of_values(kind, slot))


@pytest.mark.parametrize(("kind", "slot"), SLOTS)
def test_every_value_has_an_equal_stretch_of_the_unit_interval(kind: str, slot: str) -> None:
    found = KINDS[kind].slots[slot]
    # the stretches' lengths differ by 2^-53 at most: far less than their length
    assert found.size < 2**44
    assert found.draw(Fixed(0.0)) == found.value(0)
    assert found.draw(Fixed(1 - 2**-53)) == found.value(found.size - 1)
    for index in range(0, found.size, max(1, found.size // 400)):
        for place in (0.001, 0.999):
            assert found.draw(Fixed((index + place) / found.size)) == found.value(index)


@pytest.mark.parametrize(("kind", "slot"), SMALL)
def test_draws_are_uniform_over_the_possible_values(kind: str, slot: str) -> None:
    generator = random.Random(0)
    counts = Counter(KINDS[kind].slots[slot].draw(generator) for _ in range(8_000))
    support = values(kind, slot)
    assert counts.keys() == set(support)
    assert chisquare([counts[value] for value in support]).pvalue > 1e-5


def test_the_limit_of_possible_values() -> None:
    assert possible_values("clinical-note", "ward", limit=143) is None
    assert len(possible_values("clinical-note", "ward", limit=144) or ()) == 144
    assert values("clinical-note", "ward") == values("clinical-note", "ward")


def test_random_values_are_distinct_and_of_the_slot() -> None:
    sample = random_values("clinical-note", "record", 5_000, seed=0)
    assert len(set(sample)) == 5_000
    assert all(len(value) == 8 and value.isdecimal() for value in sample)
    assert sorted(random_values("letter", "matter", 50, seed=0)) == sorted(values("letter", "matter"))
    assert random_values("letter", "matter", 50, seed=0) == random_values("letter", "matter", 50, seed=0)


def test_random_values_are_uniform_over_seeds() -> None:
    support = values("letter", "matter")
    samples = [random_values("letter", "matter", 2, seed=seed) for seed in range(4_000)]
    for place in range(2):
        counts = Counter(sample[place] for sample in samples)
        assert chisquare([counts[value] for value in support]).pvalue > 1e-5


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="poem"):
        number_of_values("poem", "ward")
    with pytest.raises(UserError, match="ward"):
        possible_values("letter", "ward", limit=10)
    with pytest.raises(UserError, match="51"):
        random_values("letter", "matter", 51, seed=0)
