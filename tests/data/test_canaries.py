import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmend import UserError
from allmend.data import canaries as module
from allmend.data.canaries import Canary, SecretSpan, plant, read_canaries, to_records, write_canaries

CLIENTS = ("north", "south")
COPIES = (1, 3, 10)


def plan(**changes: Any) -> list[Canary]:
    return plant(**{"clients": CLIENTS, "copies": COPIES, "per_cell": 5, "seed": 0} | changes)


def secrets(canary: Canary) -> dict[str, str]:
    return {span.slot: canary.text[span.start : span.end] for span in canary.secret_spans}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_every_cell_has_as_many_controls_as_inserted(seed: int, per_cell: int) -> None:
    cells = Counter((c.client, c.copies, c.inserted) for c in plan(seed=seed, per_cell=per_cell))
    for client in CLIENTS:
        for copies in COPIES:
            assert cells[client, copies, True] == cells[client, copies, False] == per_cell


def test_ids_names_and_numbers_are_not_shared() -> None:
    canaries = plan(per_cell=100)
    assert len({c.id for c in canaries}) == len(canaries)
    people = [secrets(c)[slot] for c in canaries for slot in ("name", "contact")]
    assert len(set(people)) == len(people)
    assert len({secrets(c)["record"] for c in canaries}) == len(canaries)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_spans_hold_values_of_their_slots(seed: int) -> None:
    patterns = {
        "name": r"[A-Z][a-z]+ [A-Z][a-z]+",
        "contact": r"[A-Z][a-z]+ [A-Z][a-z]+",
        "born": r"\d{1,2} [A-Z][a-z]+ (19|20)\d\d",
        "record": r"\d{8}",
        "ward": r"\d{1,2}[A-F]",
        "review": r"\d{1,2} [A-Z][a-z]+",
        "physician": "|".join(module.SURNAMES),
        "finding": "|".join(module.FINDINGS),
    }
    for canary in plan(seed=seed):
        values = secrets(canary)
        assert values.keys() == patterns.keys()
        for slot, value in values.items():
            assert re.fullmatch(patterns[slot], value), (slot, value)
        ends = [0, *(span.end for span in canary.secret_spans)]
        assert all(span.start >= end for span, end in zip(canary.secret_spans, ends, strict=False))


def test_bits_are_the_logarithm_of_what_can_be_drawn() -> None:
    for values in (module.FIRST_NAMES, module.SURNAMES, module.FINDINGS, module.MONTHS):
        assert len(set(values)) == len(values)
    assert len(module.FIRST_NAMES) >= 100
    assert len(module.SURNAMES) >= 200
    bits = {span.slot: span.bits for span in plan()[0].secret_spans}
    assert bits["record"] == pytest.approx(8 * math.log2(10))
    assert bits["name"] == pytest.approx(math.log2(len(module.FIRST_NAMES)) + math.log2(len(module.SURNAMES)))
    # the small slots, against what is in fact drawn
    drawn: dict[str, set[str]] = {"ward": set(), "finding": set(), "review": set()}
    for canary in plan(per_cell=250):
        for slot, seen in drawn.items():
            seen.add(secrets(canary)[slot])
    for slot, seen in drawn.items():
        assert len(seen) == round(2 ** bits[slot])


def test_no_long_stretch_can_be_guessed() -> None:
    for canary in plan(per_cell=20):
        edges = [0, *(edge for span in canary.secret_spans for edge in (span.start, span.end)), len(canary.text)]
        gaps = [end - start for start, end in zip(edges[::2], edges[1::2], strict=True)]
        assert max(gaps) <= 25
        assert gaps[-1] == 1  # the full stop: nothing else follows the last secret


def test_the_coin_is_fair_and_depends_on_the_seed() -> None:
    canaries = plan(per_cell=200)
    first_in = sum(c.inserted for c in canaries if c.id.endswith("a"))
    n = len(canaries) // 2
    assert abs(first_in - n / 2) < 4 * math.sqrt(n) / 2
    coins = [[c.inserted for c in plan(seed=seed)] for seed in (0, 1)]
    assert coins[0] != coins[1]


def test_the_same_seed_gives_the_same_plan_and_another_client_changes_no_cell() -> None:
    assert plan() == plan()
    assert plan(clients=("north",)) == [c for c in plan() if c.client == "north"]


def test_a_number_that_stands_in_the_training_data_is_redrawn() -> None:
    first = plan()
    numbers = [secrets(c)["record"] for c in first]
    # within longer digits too: a model that has seen those has seen the number
    again = plan(avoid=[f"invoice 9{number}1 paid" for number in numbers[:7]])
    assert {secrets(c)["record"] for c in again}.isdisjoint(numbers[:7])
    assert all(not span.bits >= 20 or span.slot == "record" for c in first for span in c.secret_spans)


def test_records_are_the_inserted_ones_as_often_as_they_say() -> None:
    canaries = plan()
    records = to_records(canaries)
    assert len({record.id for record in records}) == len(records)
    counts = Counter(record.text for record in records)
    assert counts == {c.text: c.copies for c in canaries if c.inserted}
    assert all(record.held_out is False for record in records)


def test_pairs_by_number_of_copies() -> None:
    cells = Counter(c.copies for c in plan(clients=["one"], per_cell={1: 4, 3: 0, 10: 2}))
    assert cells == {1: 8, 10: 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "poem"}, "clinical-note"),
        ({"clients": ("a", "a")}, "repeat"),
        ({"copies": (1, 1)}, "repeat"),
        ({"copies": (0,)}, "1 or more"),
        ({"per_cell": -1}, "pairs"),
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


GOOD = {
    "id": "a",
    "kind": "clinical-note",
    "client": "north",
    "copies": 1,
    "text": "Born 1950",
    "secret_spans": [{"start": 5, "end": 9, "slot": "born", "bits": 6.0}],
    "inserted": True,
}


def test_the_example_of_the_next_test_is_good(tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(json.dumps(GOOD))
    assert read_canaries(path) == [
        Canary("a", "clinical-note", "north", 1, "Born 1950", (SecretSpan(5, 9, "born", 6.0),), True)
    ]


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
        (json.dumps(GOOD | {"inserted": 1}), "inserted"),
        (json.dumps(GOOD | {"secret_spans": [{"start": 5, "end": 10, "slot": "born", "bits": 6.0}]}), "outside"),
        (json.dumps(GOOD | {"secret_spans": [{"start": -1, "end": 9, "slot": "born", "bits": 6.0}]}), "outside"),
        (json.dumps(GOOD | {"secret_spans": [{"start": 5, "end": 5, "slot": "born", "bits": 6.0}]}), "outside"),
        (json.dumps(GOOD | {"secret_spans": [5]}), "int"),
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
