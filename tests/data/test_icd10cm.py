import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from allmend import UserError
from allmend.data import icd10cm
from allmend.data.icd10cm import CHAPTERS, MIX, SHARES, SPECIALTIES, build_icd10cm
from allmend.data.records import ClientData, Record


@pytest.fixture(scope="module")
def clients() -> list[ClientData]:
    return build_icd10cm(train=1500, held_out=100, seed=0)


def term(record: Record) -> str:
    return re.sub(r"^\w+: ", "", record.messages[0].content.split("\n")[0])


def code(record: Record) -> str:
    return record.id.rsplit(":", 1)[1]


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def chapter(icd_code: str) -> str:
    import simple_icd_10_cm as icd

    return str(icd.get_ancestors(icd_code)[-1])


def test_specialties_are_disjoint_and_shares_add_up() -> None:
    chapters = [chapter for of_client in SPECIALTIES.values() for chapter in of_client]
    assert len(chapters) == len(set(chapters)) >= 18
    assert set(chapters) == set(CHAPTERS)
    assert all(3 <= len(of_client) <= 6 for of_client in SPECIALTIES.values())
    assert SHARES.keys() == SPECIALTIES.keys()
    assert sum(SHARES.values()) == pytest.approx(1)
    assert len(set(CHAPTERS.values())) == len(CHAPTERS)


def test_sizes_are_as_asked(clients: list[ClientData]) -> None:
    assert [client.name for client in clients] == list(SPECIALTIES)
    assert sum(len(client.train) for client in clients) == 1500
    for client in clients:
        assert abs(len(client.train) - 1500 * SHARES[client.name]) < 1
        assert len(client.held_out) == 100
        for side in (client.train, client.held_out):
            kinds = Counter(record.kind for record in side)
            assert all(abs(kinds[kind] - len(side) * share) < 1 for kind, share in MIX.items())
    counts = dict(zip(SPECIALTIES, (7, 5, 3, 2), strict=True))
    by_name = build_icd10cm(train=counts, held_out=0, seed=0)
    assert {client.name: len(client.train) for client in by_name} == counts


def test_clients_ask_about_chapters_of_their_own(clients: list[ClientData]) -> None:
    for client in clients:
        asked = Counter(chapter(code(r)) for r in (*client.train, *client.held_out))
        assert set(asked) == set(SPECIALTIES[client.name])


def test_held_out_questions_are_about_what_no_client_has_seen(clients: list[ClientData]) -> None:
    train = [record for client in clients for record in client.train]
    seen_terms = {words(term(record)) for record in train}
    seen_categories = {code(record).partition(".")[0] for record in train}
    for client in clients:
        for record in client.held_out:
            assert words(term(record)) not in seen_terms
            assert code(record).partition(".")[0] not in seen_categories
    answers = {record.response for record in train if record.kind != "chapter"}
    assert answers.isdisjoint(c for client in clients for r in client.held_out for c in r.choices)


def test_ids_are_unique(clients: list[ClientData]) -> None:
    ids = [record.id for client in clients for record in (*client.train, *client.held_out)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"icd10cm:(chapter|category|code):[A-Z][0-9A-Z.]+", id) for id in ids)


def test_questions_are_well_formed_and_right(clients: list[ClientData]) -> None:
    import simple_icd_10_cm as icd

    for client in clients:
        for record in (*client.train, *client.held_out):
            assert len(set(record.choices)) == len(record.choices) == 4
            assert record.answer is not None
            assert record.choices[record.answer] == record.response
            assert len(term(record)) <= 90
            assert "encounter" not in term(record)
            names = (icd.get_description(code(record)), *icd.get_inclusion_term(code(record)))
            assert term(record) in names
            category = code(record).partition(".")[0]
            right = {
                "chapter": CHAPTERS[chapter(code(record))],
                "category": f"{category} {icd.get_description(category)}",
                "code": code(record),
            }
            assert record.response == right[record.kind]
            if record.kind == "code":
                assert len({len(choice) for choice in record.choices}) == 1
                assert term(record) in icd.get_inclusion_term(code(record))


def test_the_right_answer_stands_anywhere(clients: list[ClientData]) -> None:
    places = Counter(record.answer for client in clients for record in client.train)
    n = sum(places.values())
    # chi-square with three degrees of freedom; 16.3 is exceeded once in a thousand
    assert sum((places[i] - n / 4) ** 2 / (n / 4) for i in range(4)) < 16.3


def test_wrong_chapters_come_from_the_whole_federation(clients: list[ClientData]) -> None:
    for client in clients:
        wrong = {c for r in client.train if r.kind == "chapter" for c in r.choices if c != r.response}
        assert wrong == set(CHAPTERS.values())


def test_terms_are_spread_over_chapters_and_categories(clients: list[ClientData]) -> None:
    for client in clients:
        asked = [record for record in client.train if record.kind == "chapter"]
        per_chapter = Counter(chapter(code(record)) for record in asked)
        assert max(per_chapter.values()) - min(per_chapter.values()) <= 1
        assert max(Counter(code(record).partition(".")[0] for record in asked).values()) <= 6


def test_the_seed_decides_and_nothing_else() -> None:
    elsewhere = subprocess.run(
        [
            sys.executable,
            "-c",
            "from allmend.data.icd10cm import build_icd10cm; print(build_icd10cm(train=60, held_out=10, seed=3))",
        ],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"},
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    here = build_icd10cm(train=60, held_out=10, seed=3)
    assert elsewhere.stdout == f"{here}\n"
    assert here != build_icd10cm(train=60, held_out=10, seed=4)


def test_every_seed_has_enough_wrong_answers() -> None:
    for seed in range(4):
        for client in build_icd10cm(train=400, held_out=60, seed=seed, mix={"category": 0.5, "code": 0.5}):
            assert all(len(record.choices) == icd10cm.CHOICES for record in (*client.train, *client.held_out))


def test_too_many_or_too_few_are_refused() -> None:
    with pytest.raises(UserError, match="held-out questions of the kind"):
        build_icd10cm(train=100, held_out=100_000, seed=0)
    for train, held_out in ((3, 1), (-1, 1), (100, -1)):
        with pytest.raises(UserError, match="training"):
            build_icd10cm(train=train, held_out=held_out, seed=0)
    with pytest.raises(ValueError, match="mix"):
        build_icd10cm(train=100, held_out=1, seed=0, mix={"chapter": 0.5})
    with pytest.raises(ValueError, match="clients"):
        build_icd10cm(train={"a": 1}, held_out=1, seed=0)
