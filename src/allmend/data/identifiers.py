"""What looks like personal data in a text, counted and never shown.

A form is found, not a person: an address, a date or a number counts whether it is somebody's, made up or an example
in a manual, and a name, which has no form, is not found at all. Counts are for comparison of models and data sets;
none proves that a text holds, or does not hold, personal data. Microsoft Presidio, where it is installed, also looks
for names and places with a language model (`count_entities`).
"""

import importlib
import ipaddress
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any

from allmend.errors import UserError


@dataclass(frozen=True)
class _Form:
    """A form of an identifier.

    Attributes:
        kind: under which it is counted.
        pattern: a regular expression. Each repetition in it has an end, or begins where no other match could, so that
            a search takes a time in proportion to the text, whatever the text.
        holds: whether a match is one: what no pattern tells (a check digit, the length of a month).
        sign: stands in every match; a text without it need not be searched.
    """

    kind: str
    pattern: str
    holds: Callable[[re.Match[str]], bool] = lambda match: True
    sign: str = ""


def count_identifiers(texts: Iterable[str]) -> dict[str, int]:
    """How many identifiers the texts hold, by kind; kinds that none of them holds are absent.

    What is found as one kind is not looked at for the next, in this order, so that nothing is counted twice:

    * `credential`: a URL with a password in it, a cloud or code host's access key, the head of a private key, and what
      follows `password`, `PIN`, `api key` and the like behind a colon, or has the looks of one (letters and digits);
    * `e-mail address`;
    * `IBAN`, with its checksum (one of 97 other strings of this form passes);
    * `payment card`: 13 to 19 digits in a card's grouping, or in none, with the Luhn check digit (one of 10 passes);
    * `US social security number`: in its dashes and with possible parts;
    * `IP address`, of version 4 or 6; four short numbers of a version or a section look the same;
    * `date`: day, month and year in full, the month also as a word of six languages; a birth date is one of them;
    * `phone number`: international, North American, or national with a leading 0 and something between its groups;
    * `ICD-10 code`, with its dot;
    * `long number`: 6 or more digits in a row, as in records, insurances and accounts.

    Newlines separate; a form that is broken over two lines is not found.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        for form in _FORMS:
            text, found = _take(form, text)
            counts[form.kind] += found
    return {form.kind: counts[form.kind] for form in _FORMS if counts[form.kind]}


def count_entities(texts: Iterable[str], *, language: str = "en") -> dict[str, int] | None:
    """The same by Presidio, under its own names (`PERSON`, `LOCATION`, `DATE_TIME` …); None where it is not installed.

    Of findings that overlap, the one of the highest score counts, then the longest, the earliest, and the first by
    name.

    Args:
        texts: to be looked at.
        language: of the texts, as Presidio calls it; its language model has to be installed too.

    Raises:
        UserError: Presidio is installed, but cannot start.
    """
    try:
        presidio: Any = importlib.import_module("presidio_analyzer")
    except ModuleNotFoundError:
        return None
    try:
        analyzer = presidio.AnalyzerEngine(supported_languages=[language])
    except (Exception, SystemExit) as error:  # spaCy ends the process when it cannot fetch a model
        raise UserError(
            f"Presidio cannot start: {error}",
            hint="Install its language model (python -m spacy download en_core_web_lg), or uninstall Presidio.",
        ) from error
    counts: Counter[str] = Counter()
    for text in texts:
        taken = bytearray(len(text))
        findings = analyzer.analyze(text=text, language=language)
        for found in sorted(findings, key=lambda f: (-f.score, f.start - f.end, f.start, f.entity_type)):
            if not any(taken[found.start : found.end]):
                taken[found.start : found.end] = b"\1" * (found.end - found.start)
                counts[found.entity_type] += 1
    return dict(sorted(counts.items()))


def _take(form: _Form, text: str) -> tuple[str, int]:
    """The text with a mark in the place of each finding, and their number."""
    if form.sign not in text:
        return text, 0
    pattern = re.compile(form.pattern)  # which keeps what it has compiled
    between, start, at = [], 0, 0
    while match := pattern.search(text, at):
        if form.holds(match):
            between.append(text[start : match.start()])
            start = at = match.end()
        else:
            at = match.start() + 1  # a shorter match may begin in this one
    return "\0".join([*between, text[start:]]), len(between)


def _digits(match: re.Match[str]) -> list[int]:
    return [int(character) for character in match[0] if character.isdecimal()]


def _luhn(match: re.Match[str]) -> bool:
    """ISO/IEC 7812-1, annex B."""
    backwards = _digits(match)[::-1]
    return (sum(backwards[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in backwards[1::2])) % 10 == 0


def _national(match: re.Match[str]) -> bool:
    digits = _digits(match)
    return digits[0] == 0 != digits[1] and 9 <= len(digits) <= 12


def _iban(match: re.Match[str]) -> bool:
    """ISO 13616: 1 modulo 97, with or without capital words that follow."""
    groups = match[0].split(" ")
    while len(compact := "".join(groups)) >= 15:
        if int((compact[4:] + compact[:4]).translate(_IBAN_DIGITS)) % 97 == 1:
            return True
        if not groups.pop().isalpha():
            return False
    return False


def _address(match: re.Match[str]) -> bool:
    try:
        ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return any(character.isdigit() for character in match[0])  # `a::bad` is C++


def _calendar(year: str, month: str, day: str) -> bool:
    """Whether there is such a day; the month is a number or a word."""
    try:
        return 1800 <= date(int(year), _MONTHS.get(month.lower()) or int(month), int(day)).year < 2100
    except ValueError:
        return False


_IBAN_DIGITS = {ord(letter): str(int(letter, 36)) for letter in string.ascii_uppercase}

_MONTHS = {
    name: number
    for number, names in enumerate(
        (
            "january jan januar janvier enero gennaio januari",
            "february feb februar février febrero febbraio februari",
            "march mar märz mars marzo maart",
            "april apr avril abril aprile",
            "may mai mayo maggio mei",
            "june jun juni juin junio giugno",
            "july jul juli juillet julio luglio",
            "august aug août agosto augustus",
            "september sep sept septembre septiembre settembre",
            "october oct oktober okt octobre octubre ottobre",
            "november nov novembre noviembre",
            "december dec dezember dez décembre diciembre dicembre",
        ),
        start=1,
    )
    for name in names.split()
}
"""English, German, French, Spanish, Italian, Dutch."""

_DIGIT = "[0-9](?<![0-9]{2})"
"""The first of some digits. A set of characters comes first, and what may not stand before it after it, because then
`re` skips to the next character in the set. It is 0-9, because the class of digits holds those of all scripts."""
_YEAR = "([0-9]{4})"
_MONTH = "([A-Za-zÀ-ÿ]{3,10})"
_VALUE = """["']?[^\\s"']{4,128}"""
_MIXED = """(?=[^\\s"',;]{0,31}[0-9])(?=[^\\s"',;]{0,31}[A-Za-z])[^\\s"',;]{6,128}"""

_FORMS = (
    _Form("credential", r"://[^\s/:@]{1,64}:[^\s/@]{1,64}@"),
    _Form("credential", r"A[KS]IA(?<!\w.{4})[0-9A-Z]{16}\b"),
    _Form("credential", r"gh[pousr]_(?<!\w.{4})[A-Za-z0-9]{36}\b"),
    _Form("credential", r"-----BEGIN (?:[A-Z]{2,9} ){0,2}PRIVATE KEY-----"),
    _Form("credential", r"PIN(?<!\w...)(?: is)? ?[:=]? ?[0-9]{4,8}(?![0-9])"),
    _Form(
        "credential",
        r"[AaPpSsTt](?<![A-Za-z].)(?i:ass(?:word|wd|phrase|code)|wd|oken|(?:pi|ccess|ecret|rivate)[ _-]?key)"
        rf"""\b["']?(?: is)? ?(?:[:=] ?{_VALUE}|{_MIXED})""",
    ),
    _Form(
        "e-mail address",
        r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])",
        sign="@",
    ),
    _Form(
        "IBAN",
        r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])",
        holds=_iban,
    ),
    _Form(
        "payment card",
        r"[2-6](?<![0-9].)(?:[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{3}([ -])[0-9]{6}\2[0-9]{5}|[0-9]{12,18})"
        r"(?![0-9])",
        holds=_luhn,
    ),
    _Form(
        "US social security number",
        rf"{_DIGIT}(?<![0-9]-.)(?<!9)[0-9]{{2}}(?<!000)(?<!666)-(?!00)[0-9]{{2}}-(?!0000)[0-9]{{4}}(?!-?[0-9])",
    ),
    _Form("IP address", rf"{_DIGIT}(?<![0-9]\..)[0-9]{{0,2}}(?:\.[0-9]{{1,3}}){{3}}(?!\.?[0-9])", holds=_address),
    _Form("IP address", r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])", sign=":", holds=_address),
    _Form(
        "date",
        rf"({_DIGIT}(?<![0-9][./-].)[0-9]?)([./-]) ?([0-9]{{1,2}})\2 ?{_YEAR}(?![0-9])",
        holds=lambda found: _calendar(found[4], found[3], found[1]) or _calendar(found[4], found[1], found[3]),
    ),
    _Form(
        "date",
        r"([12](?<![0-9].)(?<![0-9][./-].)[0-9]{3})([./-])([0-9]{1,2})\2([0-9]{1,2})(?![0-9])",
        holds=lambda found: _calendar(found[1], found[3], found[4]),
    ),
    _Form(
        "date",
        rf"({_DIGIT}[0-9]?)(?:st|nd|rd|th|er|\.)?[ -](?:of |de )?{_MONTH}\.?(?:,| de)?[ -]{_YEAR}(?![0-9])",
        holds=lambda found: _calendar(found[3], found[2], found[1]),
    ),
    _Form(
        "date",
        rf"([A-Z](?<!\w.)[A-Za-z]{{2,8}})\.? ([0-9]{{1,2}})(?:st|nd|rd|th)?,? {_YEAR}(?![0-9])",
        holds=lambda found: _calendar(found[3], found[1], found[2]),
    ),
    _Form("phone number", r"(?:\+|00)(?<![\w+]\+)(?<![\w+]00)[1-9](?:[ ./()-]{0,3}[0-9]){6,14}(?![0-9])"),
    _Form(
        "phone number",
        r"[(2-9](?<![0-9].)(?<![0-9]{2}[.-].)[0-9]{2,3}(?:\) ?|[ .-])[2-9][0-9]{2}[ .-][0-9]{4}(?![.-]?[0-9])",
        holds=lambda found: len(_digits(found)) == 10,
    ),
    _Form(
        "phone number",
        r"[(0](?<![0-9].)(?<![0-9][ ./-].)[0-9]{1,6}\)?(?:[ ./-]{1,3}[0-9]{2,8}){1,4}(?![0-9])",
        holds=_national,
    ),
    _Form("ICD-10 code", r"[A-Z](?<![A-Za-z0-9].)[0-9][0-9AB]\.[0-9A-Z]{1,4}(?![A-Za-z0-9])"),
    _Form("long number", rf"{_DIGIT}(?<![0-9][.,].)[0-9]{{5,}}"),
)
