import calendar
import ipaddress
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date, timedelta
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend.data.identifiers import count_entities, count_identifiers
from allmend.errors import UserError

FOUND = {
    "credential": [
        "https://anna:geheim@files.example.org/a",
        "postgres://app:pw@store/db",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_0123456789abcdefghijABCDEFGHIJ456789",
        "-----BEGIN RSA PRIVATE KEY-----",
        "password: hunter",
        "DB_PASSWORD=hunter2",
        'api_key = "3f9c8d"',
        "the password is drum-river-382",
        "token 3fa4c09b1e",
        "PIN 4711",
        "PIN: 471199",
    ],
    "e-mail address": ["a@b.ch", "first.last+tag@sub-domain.example.co.uk", "<x_1@example.org>", "A@B.CH,C"],
    "IBAN": [
        "CH93 0076 2011 6238 5295 7",
        "DE89370400440532013000",
        "GB29 NWBK 6016 1331 9268 19",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947",
        "AT61 1904 3002 3457 3201 WITH THE BANK",
    ],
    "payment card": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "5555555555554444",
        "3782 822463 10005",
        "378282246310005",
        "4111 1111 1111 1111 123",
    ],
    "US social security number": ["078-05-1120", "no. 219-09-9999."],
    "IP address": ["192.168.0.17", "at 8.8.8.8.", "2001:db8::8a2e:370:7334", "fe80:0:0:0:1ff:fe23:4567:890a", "::1"],
    "date": [
        "17.04.1948",
        "17. 4. 1948",
        "4/17/1948",
        "17/4/1948",
        "1948-04-17",
        "1948/4/17T12:00",
        "17 April 1948",
        "the 17th of April, 1948",
        "17-Apr-1948",
        "April 17, 1948",
        "Apr. 17th 1948",
        "17. März 1948",
        "1er août 1948",
        "17 de marzo de 1948",
        "29 February 2024",
    ],
    "phone number": [
        "+41 44 123 45 67",
        "+41 (0)44 123 45 67",
        "0041441234567",
        "+1-202-555-0143",
        "(202) 555-0143",
        "202-555-0143",
        "1-202-555-0143",
        "202.555.0143",
        "044 123 45 67",
        "(020) 7946 0958",
        "030 / 1234567",
        "0171-1234567",
        "01 23 45 67 89",
    ],
    "ICD-10 code": ["E11.9", "(S72.001A)", "C7A.1"],
    "long number": ["123456", "MRN48210937", "record 48210937,", "5551234567"],
}

NOTHING = [
    "",
    "words alone, and 3 of them",
    "12345",
    "0.12345678",
    "1,234,567",
    "a@b",
    "@name and a @ b.c",
    "://host:80/path and mailto:x",
    "https://example.org/a:b/c@d",
    "passwords of 8 characters, a password policy, password managers",
    "spoken: words, a passcode of his",
    "PIN 123, SPIN 12345, OPINION",
    "31.02.1948",
    "29 February 2023",
    "1948-13-01",
    "17 Mai-Ling 1948",
    "17 Augustine 1948",
    "17 April 1048",
    "17.4.48",
    "April 1948",
    "chapter 1.2.3",
    "256.1.1.1",
    "1.2.3.4.5",
    "12:30:45",
    "1:2:3:4:5:6:7:8:9:0",
    "std::vector a::bad",
    "00:1A:2B:3C:4D:5E",
    "000-12-3456",
    "666-12-3456",
    "900-12-3456",
    "123-00-4567",
    "123-45-0000",
    "123-456-789",
    "219-09-9999-1",
    "1-219-09-9999",
    "2222 345-6789",
    "x+41 44 123 45 67",
    "100 41 44 123 45 67",
    "12-3456",
    "E119",
    "E11",
    "FE11.9",
    "E11.90000",
    "A1.5",
    "rooms 101 to 110, 202 and 555",
]

CASES = [(kind, text) for kind, texts in FOUND.items() for text in texts]


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_each_form_is_found_once_as_its_kind(kind: str, text: str) -> None:
    assert count_identifiers([text]) == {kind: 1}
    assert count_identifiers([f"Look: {text} and on."]) == {kind: 1}


@pytest.mark.parametrize("text", NOTHING)
def test_what_is_close_to_a_form_is_not_found(text: str) -> None:
    assert count_identifiers([text]) == {}


@given(st.lists(st.sampled_from(CASES), max_size=12), st.randoms())
def test_counts_add_up_in_any_order_and_over_lines(cases: list[tuple[str, str]], shuffler: random.Random) -> None:
    expected = Counter(kind for kind, _ in cases)
    texts = [text for _, text in cases]
    assert count_identifiers(texts) == expected
    shuffler.shuffle(texts)
    assert count_identifiers(texts) == expected
    assert count_identifiers(["\n".join(texts)]) == expected


def test_kinds_come_in_one_order() -> None:
    assert list(count_identifiers(text for _, text in reversed(CASES))) == list(FOUND)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ftp://a:b@mail.example.org", "credential"),  # b@mail.example.org is an address
        ("password: a@example.org", "credential"),
        ("password is 17.04.1948x", "credential"),
        ("48210937@example.org", "e-mail address"),
        ("DE89 3704 0044 0532 0130 00", "IBAN"),  # 0044 0532 0130 00 is a phone number
        ("5555555555554444", "payment card"),
        ("078-05-1120", "US social security number"),  # 078-05-1120 is a national number of nine digits
        ("10.20.30.40", "IP address"),
        ("1948-04-17", "date"),
        ("04.12.1948", "date"),
        ("202-555-0143", "phone number"),
        ("0044 123456789", "phone number"),
    ],
)
def test_what_is_of_two_forms_is_counted_as_the_first_kind(text: str, kind: str) -> None:
    assert count_identifiers([text]) == {kind: 1}


@given(st.integers(2 * 10**14, 7 * 10**14 - 1), st.sampled_from(["", " ", "-"]))
def test_one_last_digit_in_ten_makes_a_card(first: int, separator: str) -> None:
    def grouped(last: int) -> str:
        digits = f"{first}{last}"
        return separator.join(digits[i : i + 4] for i in range(0, 16, 4))

    cards = [last for last in range(10) if "payment card" in count_identifiers([grouped(last)])]
    assert len(cards) == 1
    # by the definition: every second digit from the right counts double, with its digits added
    total = sum(int(d) if place % 2 else sum(map(int, str(2 * int(d)))) for place, d in enumerate(str(first)))
    assert (total + cards[0]) % 10 == 0


@given(st.sampled_from(FOUND["IBAN"][:-1]), st.data())
def test_one_wrong_digit_makes_no_iban(iban: str, data: st.DataObject) -> None:
    places = [place for place, character in enumerate(iban) if character.isdecimal()]
    place = data.draw(st.sampled_from(places))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != iban[place]]))
    assert "IBAN" not in count_identifiers([iban[:place] + digit + iban[place + 1 :]])


@pytest.mark.parametrize(
    "form", ["{d}.{m}.{y}", "{m:02}/{d:02}/{y}", "{y}-{m:02}-{d:02}", "{d} {name} {y}", "{name} {d}, {y}"]
)
def test_every_day_is_a_date_and_no_other_is(form: str) -> None:

    def written(y: int, m: int, d: int) -> str:
        return form.format(y=y, m=m, d=d, name=calendar.month_name[m])

    days = [date(1996, 1, 1) + timedelta(days=i) for i in range(366 + 365)]
    assert count_identifiers(written(day.year, day.month, day.day) for day in days) == {"date": len(days)}
    # no day of any month, whichever of the two numbers is the month
    others = [(1996, 2, 30), (1997, 2, 29), (1996, 4, 31), (1996, 12, 32), (1996, 6, 0)]
    assert count_identifiers(written(*other) for other in others) == {}


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_ip_addresses_are_found(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    text = str(address)
    if any(character.isdecimal() for character in text) and getattr(address, "ipv4_mapped", None) is None:
        assert count_identifiers([f"from {text} on"]) == {"IP address": 1}


def test_a_failed_match_does_not_hide_the_next() -> None:
    # the first sixteen digits make no card, the last sixteen do
    assert count_identifiers(["1234 5678 4111 1111 1111 1111"]) == {"payment card": 1}
    assert count_identifiers(["31.02.1948 17.04.1948"]) == {"date": 1}


def test_a_line_break_separates() -> None:
    assert count_identifiers(["17 April\n1948", "044 123\n45 67", "123\n456"]) == {}


def test_a_clinical_note_has_its_dates_and_numbers() -> None:
    note = (
        "Ward 12F: Ngozi Wallin, born 17 May 1948, record number 48210937, was admitted with gallstones. "
        "Next of kin Lars Okafor, +41 44 123 45 67. Review on 3 March."
    )
    assert count_identifiers([note] * 3) == {"date": 3, "phone number": 3, "long number": 3}


ADVERSARIES = [
    *("a", "1", "0", "-", ":", " ", ".", "+", "(", "é", "A", "'", "@"),
    *("a@", "a.", "1 ", "1-", "1.", "1/", "+1", "0 ", "01 ", "A1", "A1 ", "AB12 ", "0:", "f:", "://", "://a:", "(5"),
    *("1 May ", "May ", "May 1 ", "1/1/", "4111 ", "99999999 ", "123-45-", "password", "password ", "api-key is "),
    *("-----BEGIN ", "gh", "AKIA", "PIN", "A00.", "+1 (", "00 1", "1.1.1.", "a-", "DE89 3704 0044 0532 0130 01 "),
]


@pytest.mark.parametrize("ending", ["", "@a", "://"])
def test_time_grows_with_the_text_and_not_faster(ending: str) -> None:
    for unit in ADVERSARIES:
        text = (unit * 60_000)[:60_000] + ending
        start = time.process_time()
        count_identifiers([text])
        # a step for each pair of characters would take ten seconds or more; some for each character take a tenth of one
        assert time.process_time() - start < 2, unit


@dataclass
class Result:
    """As `presidio_analyzer.RecognizerResult`."""

    entity_type: str
    start: int
    end: int
    score: float


@dataclass
class Presidio:
    """Stands in for Presidio: what it finds, by text, and the languages that it was asked for."""

    results: dict[str, list[Result]] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    failure: BaseException | None = None


@pytest.fixture
def presidio(monkeypatch: pytest.MonkeyPatch) -> Presidio:
    stub = Presidio()

    class AnalyzerEngine:
        def __init__(self, *, supported_languages: list[str]) -> None:
            if stub.failure:
                raise stub.failure
            stub.asked.append(supported_languages)

        def analyze(self, text: str, language: str) -> list[Result]:
            stub.asked.append(language)
            return stub.results[text]

    module: Any = ModuleType("presidio_analyzer")
    module.AnalyzerEngine = AnalyzerEngine
    monkeypatch.setitem(sys.modules, "presidio_analyzer", module)
    return stub


def test_entities_of_presidio_are_counted_by_type(presidio: Presidio) -> None:
    presidio.results = {
        "Ngozi Wallin of Chur": [Result("PERSON", 0, 12, 0.85), Result("LOCATION", 16, 20, 0.85)],
        "Lars": [Result("PERSON", 0, 4, 0.6)],
        "": [],
    }
    assert count_entities(presidio.results, language="de") == {"LOCATION": 1, "PERSON": 2}
    assert presidio.asked == [["de"], "de", "de", "de"]


def test_overlapping_entities_count_once(presidio: Presidio) -> None:
    presidio.results = {
        "a score": [Result("LOW", 0, 9, 0.3), Result("HIGH", 5, 7, 0.9), Result("APART", 8, 9, 0.1)],
        "a length": [Result("SHORT", 0, 5, 0.5), Result("LONG", 3, 9, 0.5)],
        "a place": [Result("LATER", 2, 6, 0.5), Result("EARLIER", 0, 4, 0.5)],
        "a name": [Result("B", 0, 4, 0.5), Result("A", 0, 4, 0.5)],
        "neighbours": [Result("N", 0, 4, 0.5), Result("N", 4, 8, 0.5)],
    }
    expected = {"A": 1, "APART": 1, "EARLIER": 1, "HIGH": 1, "LONG": 1, "N": 2}
    assert count_entities(presidio.results) == expected
    for results in presidio.results.values():
        results.reverse()
    assert count_entities(presidio.results) == expected


@pytest.mark.parametrize("failure", [SystemExit(1), OSError("no model 'en_core_web_lg'")])
def test_a_presidio_without_its_model_is_the_users_to_mend(presidio: Presidio, failure: BaseException) -> None:
    presidio.failure = failure
    with pytest.raises(UserError, match="spacy download") as raised:
        count_entities(["text"])
    assert str(failure) in str(raised.value)


def test_without_presidio_there_is_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    assert count_entities(["Ngozi Wallin"]) is None
