import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2_contingency, chisquare

from allmend import UserError
from allmend.data import canaries as module
from allmend.data.canaries import Canary, SecretSpan, plant, read_canaries, to_records, write_canaries
from allmend.data.canary_kinds import FINDINGS, KINDS, SURNAMES, possible_values

CLIENTS = ("north", "south")
COPIES = (1, 3, 10)
ALL = tuple(KINDS)


def plan(**changes: Any) -> list[Canary]:
    return plant(**{"clients": CLIENTS, "copies": COPIES, "per_cell": 5, "seed": 0, "kinds": ALL} | changes)


def secrets(canary: Canary) -> dict[str, str]:
    return {span.slot: canary.text[span.start : span.end] for span in canary.secret_spans}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_ids_name_the_cells_and_say_nothing_else(seed: int, per_cell: int) -> None:
    canaries = plan(seed=seed, per_cell=per_cell)
    expected = product(ALL, CLIENTS, COPIES, range(per_cell))
    assert [c.id for c in canaries] == [f"{kind}/{client}/{n}x/{index:03d}" for kind, client, n, index in expected]
    assert all(c.id.startswith(f"{c.kind}/{c.client}/{c.copies}x/") for c in canaries)


def test_names_and_numbers_are_not_shared() -> None:
    canaries = plan(per_cell=100)
    people = ("name", "contact", "sender", "recipient", "signatory", "owner")
    for slots in (people, ("provider", "customer"), *((slot,) for slot in NUMBERS)):
        held = [values[slot] for values in map(secrets, canaries) for slot in slots if slot in values]
        assert len(set(held)) == len(held) > 0


NUMBERS = {
    "record": r"\d{8}",
    "phone": r"07\d \d{3} \d\d \d\d",
    "number": r"\d{4}-\d{4}",
    "host": r"[a-z]+\d\d\.[a-z]+\.example",
    "user": r"[a-z]+\d{3}",
    "password": r"[a-z]+-[a-z]+-\d{3}",
    "token": r"[0-9a-f]{10}",
}
PERSON = r"[A-Z][a-z]+ [A-Z][a-z]+"
DAY = r"\d{1,2} [A-Z][a-z]+"
PATTERNS = {
    "clinical-note": {
        "name": PERSON,
        "born": DAY + r" (19|20)\d\d",
        "record": NUMBERS["record"],
        "ward": r"\d{1,2}[A-F]",
        "physician": "|".join(SURNAMES),
        "finding": "|".join(FINDINGS),
        "contact": PERSON,
        "review": DAY,
    },
    "letter": {
        "sender": PERSON,
        "recipient": PERSON,
        "street": r"\d{1,3} [A-Z][a-z]+ [A-Z][a-z]+",
        "town": r"[A-Z][a-z]+",
        "matter": r"the [a-z ]+",
        "day": DAY,
        "phone": NUMBERS["phone"],
    },
    "contract": {
        "provider": r"[A-Z][a-z]+ [A-Z][a-z]+ (Ltd|GmbH|SA|Inc|BV|AB)",
        "customer": r"[A-Z][a-z]+ [A-Z][a-z]+ (Ltd|GmbH|SA|Inc|BV|AB)",
        "service": r"[a-z ]+",
        "fee": r"CHF \d\d,\d\d0",
        "term": r"\d{1,2} months",
        "signed": DAY,
        "signatory": PERSON,
        "number": NUMBERS["number"],
        "court": r"[A-Z][a-z]+",
    },
    "credential": {
        "system": r"the [a-z ]+",
        "host": NUMBERS["host"],
        "user": NUMBERS["user"],
        "password": NUMBERS["password"],
        "pin": r"\d{4}",
        "token": NUMBERS["token"],
        "owner": PERSON,
        "expiry": r"[A-Z][a-z]+ 20\d\d",
    },
}


@cache
def listed(kind: str, slot: str) -> frozenset[str] | None:
    possible = possible_values(kind, slot, limit=10_000)
    return None if possible is None else frozenset(possible)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_spans_hold_values_of_their_slots(seed: int) -> None:
    for canary in plan(seed=seed):
        values = secrets(canary)
        assert values.keys() == PATTERNS[canary.kind].keys()
        for span in canary.secret_spans:
            value = values[span.slot]
            assert re.fullmatch(PATTERNS[canary.kind][span.slot], value), (span.slot, value)
            possible = listed(canary.kind, span.slot)
            assert span.bits > 13 if possible is None else value in possible and span.bits == math.log2(len(possible))
        ends = [0, *(span.end for span in canary.secret_spans)]
        assert all(span.start >= end for span, end in zip(canary.secret_spans, ends, strict=False))


def test_no_long_stretch_can_be_guessed() -> None:
    for canary in plan(per_cell=20):
        edges = [0, *(edge for span in canary.secret_spans for edge in (span.start, span.end)), len(canary.text)]
        gaps = [end - start for start, end in zip(edges[::2], edges[1::2], strict=True)]
        assert max(gaps) <= 25
        assert gaps[-1] == 1  # the full stop: nothing else follows the last secret


def test_coins_are_fair_and_not_balanced() -> None:
    n = 3
    clients = [f"client-{number}" for number in range(250)]
    canaries = plan(clients=clients, per_cell=n, kinds=("clinical-note",))
    inserted = Counter((c.client, c.copies) for c in canaries if c.inserted)
    cells = Counter(inserted[cell] for cell in product(clients, COPIES))
    expected = binom.pmf(range(n + 1), n, 0.5) * len(clients) * len(COPIES)
    assert chisquare([cells[k] for k in range(n + 1)], expected).pvalue > 1e-5


def test_coins_do_not_depend_on_one_another_nor_on_the_text() -> None:
    canaries = plan(per_cell=100)
    pairs = Counter(pairwise(c.inserted for c in canaries))
    openings = Counter((c.inserted, c.kind, c.secret_spans[0].slot) for c in canaries)
    initials = Counter((c.inserted, secrets(c)["record"][0]) for c in canaries if c.kind == "clinical-note")
    for counts in (pairs, Counter({(i, (k, s)): n for (i, k, s), n in openings.items()}), initials):
        others = sorted({other for _, other in counts})
        table = [[counts[inserted, other] for other in others] for inserted in (False, True)]
        assert chi2_contingency(table).pvalue > 1e-5


def test_the_seed_decides_secrets_and_coins() -> None:
    assert plan() == plan()
    one, other = plan(seed=0), plan(seed=1)
    assert [c.inserted for c in one] != [c.inserted for c in other]
    assert {c.text for c in one}.isdisjoint(c.text for c in other)


@pytest.mark.parametrize(
    "changes", [{"clients": ("north",)}, {"copies": (10, 1)}, {"kinds": ("contract", "letter")}, {"per_cell": 3}]
)
def test_a_canary_depends_on_its_own_cell_and_place_only(changes: dict[str, Any]) -> None:
    whole = {c.id: c for c in plan()}
    for canary in plan(**changes):
        assert canary.inserted == whole[canary.id].inserted
        if canary.text != whole[canary.id].text:  # it was redrawn there, because another has one of its secrets
            others = {value for other in whole.values() if other.id != canary.id for value in secrets(other).values()}
            own = [canary.text[span.start : span.end] for span in canary.secret_spans if span.bits >= 15]
            assert not others.isdisjoint(own)


def test_only_the_random_method_that_never_changes_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Promised(random.Random):
        def getrandbits(self, k: int, /) -> int:  # what `choice`, `randrange`, `sample` and `shuffle` go through
            raise AssertionError

    with pytest.raises(AssertionError):
        Promised(0).choice("ab")
    expected = plan()
    monkeypatch.setattr(module, "random", SimpleNamespace(Random=Promised))
    assert plan() == expected


def test_another_process_plants_the_same() -> None:
    code = (
        "from allmend.data.canaries import plant\n"
        "print(plant(clients=('a',), copies=(1,), per_cell=9, seed=0, avoid=['x']))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{plant(clients=('a',), copies=(1,), per_cell=9, seed=0)}\n"}


LARGE = ("record", "phone", "number", "host", "password", "token")


@pytest.mark.parametrize("slot", LARGE)
def test_a_secret_that_stands_in_the_training_data_is_redrawn(slot: str) -> None:
    first = plan()
    holders = [c for c in first if slot in secrets(c)]
    values = [secrets(c)[slot] for c in holders]
    # within a longer word or number too: a model that has seen that has seen the secret
    again = plan(avoid=[f"invoice 9{value}1 paid" for value in values[:7]])
    assert {secrets(c)[slot] for c in again if slot in secrets(c)}.isdisjoint(values[:7])
    redrawn = {old.id for old, new in zip(first, again, strict=True) if old.text != new.text}
    assert redrawn == {c.id for c in holders[:7]}
    assert [c.inserted for c in again] == [c.inserted for c in first]


def test_redrawing_goes_on_until_nothing_stands_in_the_training_data() -> None:
    avoid: list[str] = []
    for _ in range(4):
        avoid += [canary.text for canary in plan(avoid=avoid)]
    whole = "\n".join(avoid)
    assert not [
        c.id for c in plan(avoid=avoid) for slot, value in secrets(c).items() if slot in LARGE and value in whole
    ]


def test_a_small_secret_may_stand_in_the_training_data() -> None:
    first = plan()
    small = [value for c in first for slot, value in secrets(c).items() if slot not in LARGE]
    assert plan(avoid=small) == first


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab-]^\\\n", min_size=1, max_size=20), unique=True, max_size=12),
    st.lists(st.text("ab-]^\\\n", max_size=60), max_size=4),
)
@example(["4711", "ab-12"], ["47", "11", "see xab-1", "2"])  # not across two texts
def test_a_secret_is_found_where_a_plain_search_finds_it(strings: list[str], texts: list[str]) -> None:
    # many texts hold one, and many strings begin alike for longer than the search's window
    strings += ["ab" * 9 + string for string in strings]
    texts += [f"a{string}b" for string in strings[::3]]
    found = module._standing(set(strings), texts)
    assert found == {string for string in strings if any(string in text for text in texts)}


def test_records_are_the_inserted_ones_as_often_as_they_say() -> None:
    canaries = plan()
    records = to_records(canaries)
    assert len({record.id for record in records}) == len(records)
    counts = Counter(record.text for record in records)
    assert counts == {c.text: c.copies for c in canaries if c.inserted}
    assert all(record.held_out is False for record in records)


def test_canaries_by_number_of_copies() -> None:
    cells = Counter(c.copies for c in plan(clients=["one"], kinds=["letter"], per_cell={1: 4, 3: 0, 10: 2}))
    assert cells == {1: 4, 10: 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("letter", "poem")}, "'poem'(.|\n)*clinical-note"),
        ({"kinds": ("letter", "letter")}, "kinds .* repeat"),
        ({"clients": ("a", "a")}, "clients .* repeat"),
        ({"copies": (1, 1)}, "copies .* repeat"),
        ({"copies": (0,)}, "1 or more"),
        ({"per_cell": -1}, "number of canaries"),
        ({"per_cell": {1: 2}}, r"\[3, 10\]"),
        ({"per_cell": 10_000}, "too many"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**changes)


def test_written_canaries_read_back(tmp_path: Path) -> None:
    canaries = plan()
    write_canaries(tmp_path / "canaries.jsonl", canaries)
    assert read_canaries(tmp_path / "canaries.jsonl") == canaries


@st.composite
def foreign(draw: st.DrawFn) -> Canary:
    text = draw(st.text(min_size=4))
    edges = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans = tuple(
        SecretSpan(start, end, draw(st.text()), draw(st.floats(0, 100)))
        for start, end in zip(edges[::2], edges[1::2], strict=False)
    )
    id, client, copies, inserted = draw(st.tuples(st.text(), st.text(), st.integers(1), st.booleans()))
    return Canary(id, "of another generator", client, copies, text, spans, inserted)


@settings(max_examples=50, deadline=None)
@given(st.lists(foreign(), min_size=1, max_size=3, unique_by=lambda canary: canary.id))
def test_canaries_made_elsewhere_read_back(tmp_path_factory: pytest.TempPathFactory, canaries: list[Canary]) -> None:
    path = tmp_path_factory.getbasetemp() / "foreign.jsonl"
    write_canaries(path, canaries)
    assert read_canaries(path) == canaries


GOOD = {
    "id": "a",
    "kind": "note",
    "client": "north",
    "copies": 1,
    "text": "Born 1950 12345678",
    "secret_spans": [{"start": 5, "end": 9, "slot": "born", "bits": 6.0}],
    "inserted": True,
}


def with_spans(*spans: tuple[int, int, str, float], kind: str = "note") -> str:
    fields = [dict(zip(("start", "end", "slot", "bits"), span, strict=True)) for span in spans]
    return json.dumps(GOOD | {"kind": kind, "secret_spans": fields})


def test_the_examples_of_the_next_test_are_good(tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(json.dumps(GOOD))
    assert read_canaries(path) == [
        Canary("a", "note", "north", 1, "Born 1950 12345678", (SecretSpan(5, 9, "born", 6.0),), True)
    ]
    for line in (
        with_spans((0, 5, "a", 0.0), (5, 9, "b", 6.0), (10, 18, "c", 1.5)),
        with_spans((10, 18, "record", math.log2(10**8)), kind="clinical-note"),
    ):
        path.write_text(line)
        assert len(read_canaries(path)) == 1
    path.write_text(with_spans((5, 9, "born", 6)))  # as other programs write a whole number
    ((span,),) = (canary.secret_spans for canary in read_canaries(path))
    assert (span.bits, type(span.bits)) == (6.0, float)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no canary"),
        ("{", r":1: is no canary"),
        ("[]", "list"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), r":2: .*stands twice"),
        (json.dumps({"prompt": "x"}), "prompt"),
        (json.dumps(GOOD | {"copies": "1"}), "copies"),
        (json.dumps(GOOD | {"copies": 0}), "copies"),
        (json.dumps(GOOD | {"text": ""}), "empty"),
        (json.dumps(GOOD | {"inserted": 1}), "inserted"),
        (json.dumps(GOOD | {"secret_spans": [5]}), "int"),
        (with_spans((5, 19, "a", 6.0)), "outside"),
        (with_spans((-1, 9, "a", 6.0)), "outside"),
        (with_spans((5, 5, "a", 6.0)), "outside"),
        (with_spans((0, 6, "a", 6.0), (5, 9, "b", 6.0)), "begins before"),
        (with_spans((5, 9, "a", 6.0), (0, 4, "b", 6.0)), "begins before"),
        (with_spans((5, 9, "a", math.nan)), "nan bits"),
        (with_spans((5, 9, "a", math.inf)), "inf bits"),
        (with_spans((5, 9, "a", -1.0)), "-1.0 bits"),
        (with_spans((5, 9, "a", True)), "'bits' is True, not of type float"),
        (with_spans((10, 18, "phone", 26.6), kind="clinical-note"), "'phone' .* has none"),
        (with_spans((10, 18, "record", 20.0), kind="clinical-note"), "20.00 bits.* has one of 26.58"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_canaries(path)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name in ("absent", "latin", "."):
        with pytest.raises(UserError):
            read_canaries(tmp_path / name)
