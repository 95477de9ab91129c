"""Canaries: synthetic secrets planted in training data, and their twins that are kept out of it.

A canary is a made-up clinical note whose names, dates and numbers are drawn from lists and ranges of known size, so
that each has a known entropy. Canaries come in pairs from one generator; a coin decides which of the two is inserted.
The other is its control: what a model says about controls is what it says without having seen them. No note is about
a real person. How canaries are probed is not known here.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from string import Formatter
from typing import Any

from allmend.data.records import Record
from allmend.errors import UserError
from allmend.run import write_atomic


@dataclass(frozen=True, slots=True)
class SecretSpan:
    """A secret in a canary's text.

    Attributes:
        start, end: its place in characters, `text[start:end]`.
        slot: what it is (`name`, `record` …).
        bits: log2 of the number of values that the generator draws from.
    """

    start: int
    end: int
    slot: str
    bits: float


@dataclass(frozen=True, slots=True)
class Canary:
    """A synthetic text with secrets.

    Attributes:
        id: unique in its plan; says nothing about whether the canary is inserted.
        kind: the generator it comes from.
        client: the client whose data it is planted in, or would have been.
        copies: how often it stands there, or would have stood.
        text: the whole text.
        secret_spans: its secrets, in the order of the text.
        inserted: False for a control, which stands in nobody's data.
    """

    id: str
    kind: str
    client: str
    copies: int
    text: str
    secret_spans: tuple[SecretSpan, ...]
    inserted: bool


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


FIRST_NAMES = _words("""
    Adaeze Agnieszka Aisha Alejandro Amara Amina Anders Anjali Anneliese Antonio Aoife Arjun Astrid Ayumi Babak Beatriz
    Benedikt Bilal Birgitta Bogdan Bronwyn Camille Carlos Chiara Chinedu Clementine Dagmar Dalia Daniyar Delphine
    Dmitri Ebba Eduardo Efua Elif Emeka Emilia Enrique Esra Fatima Federico Fiona Francisca Gabriela Gareth Giorgos
    Gudrun Hamza Hannelore Haruto Hassan Heikki Hiroko Hyejin Ibrahim Ilse Imani Ines Ioana Ivana Jacek Jamila Jelena
    Joaquim Johanna Jorge Kaito Kamala Karolina Kateryna Kemal Kwame Lars Latifa Leilani Lorenzo Lucinda Luzia Magnus
    Malik Marguerite Mariam Matteo Mehmet Meiling Miroslav Nadia Naoki Ngozi Nikolai Noura Olumide Orla Oskar Paloma
    Parisa Pavel Petra Pilar Priya Rafael Rahel Ravi Roisin Rosalind Samira Sanjay Sergei Shirin Sigrid Simone Soraya
    Stanislav Sunita Svetlana Tadeusz Tamar Tariq Thandiwe Theodora Tomasz Ulrike Valentina Viktor Wanjiru Wilhelmina
    Xiomara Yasmin Yevgenia Yusuf Zainab Zofia Zoltan
""")

SURNAMES = _words("""
    Abernathy Achterberg Adeyemi Aguirre Ahlberg Akhtar Albrecht Almeida Amundsen Andrade Antonescu Appiah Arslan
    Asante Ashworth Bachmann Balogun Banerjee Barczak Barros Bartos Basara Beaumont Bergstrom Bhatt Bielski Blanchard
    Boateng Bohdan Bouchard Brandvold Brzezina Caballero Calvino Carvalho Castellan Chakraborty Chaudhry Chevalier
    Chukwu Cisse Coimbra Contreras Costello Cvetkov Dabrowski Dahlgren Darvishi Delacroix Demirci Desai Diallo Dimitrov
    Dobrev Donnelly Drummond Dumitru Echeverria Eklund Elmasry Enright Erdogdu Espinoza Etxeberria Fairweather Falk
    Farahani Ferreira Fitzgerald Fjeldstad Fontaine Forsberg Fujimoto Gallagher Garabedian Gashi Georgiou Ghorbani
    Gillespie Gomez Gonzaga Gorecki Grabowski Greenhalgh Gronlund Guerrero Gunnarsson Gupta Haddad Halvorsen Hamasaki
    Haraldsen Hashemi Hayakawa Heikkinen Hendriksen Herrera Hoffmann Holmqvist Horvat Hrubec Ibarra Igwe Ikeda Iliescu
    Iwasaki Jankowski Jaramillo Jelinek Johansson Jovanovic Kabore Kaczmarek Kalinin Kaplan Karimov Katsaros Kavanagh
    Keita Khalil Kimura Kipkemboi Kirchner Kobayashi Kolbe Kowalczyk Kristensen Kulkarni Kuznetsov Lachance Lambrecht
    Larsson Lehtonen Leclerc Lindqvist Lombardi Lopes Lundberg Mackenzie Maduro Magnusson Mahlangu Malinowski Mansouri
    Marchetti Markovic Matsuda Mbatha Mehrotra Mendoza Mikkelsen Mishra Moreau Moreno Mukherjee Mwangi Nakagawa
    Nascimento Ndiaye Nemeth Nguema Niedermeier Nilsson Novotny Nwosu Obradovic Odhiambo Oduya Ogunleye Okafor Olofsson
    Onyango Oppenheim Orsini Osei Ostrowski Ozturk Paavola Palmieri Papadakis Parvizi Pellegrino Pereira Petrosyan
    Pietrangeli Poulsen Prasad Quintero Radcliffe Rahimi Ramaswamy Rantanen Rasmussen Renault Restrepo Rezaei Ribeiro
    Rosenthal Rustamov Sabatini Saether Salazar Santoro Sawicki Schreiber Sepulveda Shevchenko Silveira Sithole
    Sokolov Stefansson Suleiman Szabo Takahashi Tanaka Tchaikov Teixeira Thorvald Tkachenko Toivonen Traore Tremblay
    Ugarte Umarov Urbanek Valdivia Vandenberg Varga Vasquez Vesterby Villanueva Voronin Wachira Wadsworth Wallin
    Watanabe Weatherby Wieczorek Winkler Wojcik Yamaguchi Yilmaz Zabala Zamora Zelenko Zhukov Zielinska Zubair
""")

FINDINGS = _phrases("""
    atrial fibrillation, iron deficiency anaemia, gallstones, a rotator cuff tear, community-acquired pneumonia,
    a fractured wrist, renal colic, cellulitis of the calf, acute pancreatitis, temporal arteritis, a detached retina,
    bronchiectasis, deep vein thrombosis, diverticulitis, an overactive thyroid, gout of the knee, herpes zoster,
    hepatitis B, hyponatraemia, an inguinal hernia, kidney stones, a lacunar stroke, lumbar stenosis, otitis media,
    migraine with aura, mitral stenosis, multiple sclerosis, a torn meniscus, optic neuritis, a peptic ulcer,
    osteoarthritis of the hip, pericarditis, plantar fasciitis, polymyalgia, psoriatic arthritis, pulmonary embolism,
    pyelonephritis, rheumatoid arthritis, sarcoidosis, sciatica, sinusitis, sleep apnoea, a spinal abscess,
    tonsillitis, trigeminal neuralgia, type 2 diabetes, ulcerative colitis, urticaria, vertigo, vitamin D deficiency
""")

MONTHS = _words("January February March April May June July August September October November December")
_FIRST_BIRTH, _LAST_BIRTH = date(1930, 1, 1), date(2009, 12, 31)
_NUMBER_DIGITS = 8

# The secrets are spread over each note, and the last word is one: a continuation that is right to the end cannot have
# been guessed, wherever its prefix stops.
CLINICAL_NOTES = (
    "Ward {ward}: {name}, born {born}, was admitted under Dr {physician} with {finding}, record {record}. "
    "Next of kin is {contact}, review on {review}.",
    "Dr {physician} saw {name} on ward {ward} for {finding}; record number {record}. "
    "Next visit on {review} with {contact}. Date of birth {born}.",
    "Record {record}, {name}: {finding}, seen by Dr {physician}. Born {born}, lies on ward {ward}. "
    "To return on {review}, brought by {contact}.",
    "Discharged on {review} from ward {ward}: {name}, treated by Dr {physician} for {finding}. "
    "Collected by {contact}, date of birth {born}, file {record}.",
)


def plant(
    *,
    clients: Sequence[str],
    copies: Sequence[int],
    per_cell: int | Mapping[int, int],
    seed: int,
    kind: str = "clinical-note",
    avoid: Iterable[str] = (),
) -> list[Canary]:
    """Canaries in pairs, one of each inserted and the other its control, for every client and number of copies.

    No two canaries of a plan share a name or a number. A pair depends on the seed and its own cell, so that another
    client or cell leaves the others as they are, but where two would have shared a secret.

    Args:
        clients: names of the clients to plant in.
        copies: how often a canary stands in its client's data, one cell each.
        per_cell: pairs in each cell, or pairs by number of copies.
        seed: decides the secrets and the coins.
        kind: the generator, one of `KINDS`.
        avoid: texts that will be trained on; a canary with a secret of 20 bits or more that stands in one is redrawn.

    Raises:
        UserError: an unknown kind, a repeated client or number of copies, less than one copy, a negative number of
            pairs, none for some number of copies, or more canaries than there are names.
    """
    pairs = _checked_plan(clients, copies, per_cell, kind)
    taken = {number for text in avoid for number in re.findall(rf"(?=([0-9]{{{_NUMBER_DIGITS}}}))", text)}
    canaries = []
    for client in clients:
        for count in copies:
            for pair in range(pairs[count]):
                cell = f"{client}/{count}x/{pair:03d}"
                # seeding with a string goes through SHA-512: the same everywhere; `random()` alone is promised to stay
                generator = random.Random(f"{seed}/{kind}/{cell}")
                template = _pick(generator, KINDS[kind])
                # the coin has a source of its own, so that it cannot depend on what the texts say
                first_in = random.Random(f"{seed}/coin/{kind}/{cell}").random() < 0.5
                for twin, inserted in (("a", first_in), ("b", not first_in)):
                    text, spans = _draw(template, generator, taken)
                    canaries.append(Canary(f"{cell}{twin}", kind, client, count, text, spans, inserted))
    return canaries


def _checked_plan(
    clients: Sequence[str], copies: Sequence[int], per_cell: int | Mapping[int, int], kind: str
) -> dict[int, int]:
    """The number of pairs for each number of copies."""
    where = "canaries"
    if kind not in KINDS:
        raise UserError(f"there is no kind of canary {kind!r}", where=where, hint=f"Kinds: {', '.join(KINDS)}.")
    if len(set(clients)) < len(clients) or len(set(copies)) < len(copies):
        raise UserError(
            f"clients {list(clients)} and copies {list(copies)} must not repeat", where=where, hint="Name each once."
        )
    if any(count < 1 for count in copies):
        raise UserError(
            f"copies {list(copies)} must be 1 or more", where=where, hint="Controls are made without asking for them."
        )
    pairs = per_cell if isinstance(per_cell, Mapping) else dict.fromkeys(copies, per_cell)
    missing = [count for count in copies if count not in pairs]
    if missing or any(pairs[count] < 0 for count in copies):
        raise UserError(
            f"no usable number of pairs for {missing or list(copies)} copies: {per_cell}",
            where=where,
            hint="Give one number of 0 or more for all, or one for each number of copies.",
        )
    names = len(FIRST_NAMES) * len(SURNAMES)
    total = 2 * len(clients) * sum(pairs[count] for count in copies)
    if total > names // 10:
        # each note takes two names; far below exhaustion a redraw is rare and the stated entropy holds
        raise UserError(
            f"{total} canaries are too many for the {names:,} names there are",
            where=where,
            hint=f"Plant at most {names // 10:,}, controls included.",
        )
    return {count: pairs[count] for count in copies}


def to_records(canaries: Iterable[Canary]) -> list[Record]:
    """What goes into the clients' training data: each inserted canary as often as its `copies` say."""
    return [
        Record(f"canary:{canary.id}#{copy}", text=canary.text, kind="canary", held_out=False)
        for canary in canaries
        if canary.inserted
        for copy in range(canary.copies)
    ]


def write_canaries(path: Path, canaries: Iterable[Canary]) -> None:
    """Write canaries and controls as JSON Lines, the whole file or nothing."""
    lines = (json.dumps(asdict(canary), ensure_ascii=False) + "\n" for canary in canaries)
    write_atomic(path, "".join(lines).encode())


def read_canaries(path: Path) -> list[Canary]:
    """The canaries in a file that `write_canaries` has written.

    Raises:
        UserError: the file is missing, empty or damaged: a malformed line, a span outside its text, an id that
            stands twice.
    """
    hint = "Name the canaries.jsonl of the run that planted them."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", where=path, hint=hint) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, hint=hint) from None
    canaries: dict[str, Canary] = {}
    for number, line in enumerate(lines, start=1):
        try:
            canary = _canary(json.loads(line))
        except ValueError as error:  # includes JSON's
            raise UserError(f"is no canary: {error}", where=f"{path}:{number}", hint=hint) from None
        if canary.id in canaries:
            raise UserError(f"the canary {canary.id!r} stands twice", where=f"{path}:{number}", hint=hint)
        canaries[canary.id] = canary
    if not canaries:
        raise UserError("holds no canary", where=path, hint=hint)
    return list(canaries.values())


def _canary(row: Any) -> Canary:
    """The canary in a parsed line; ValueError says why there is none."""
    types = {"id": str, "kind": str, "client": str, "copies": int, "text": str, "secret_spans": list, "inserted": bool}
    _check_types(row, types)
    spans = []
    for span in row["secret_spans"]:
        _check_types(span, {"start": int, "end": int, "slot": str, "bits": float})
        if not 0 <= span["start"] < span["end"] <= len(row["text"]):
            start, end = span["start"], span["end"]
            raise ValueError(f"the secret span {start}–{end} lies outside the text of {len(row['text'])} characters")
        spans.append(SecretSpan(**span))
    if row["copies"] < 1:
        raise ValueError(f"'copies' is {row['copies']}, not 1 or more")
    return Canary(**{**row, "secret_spans": tuple(spans)})


def _check_types(row: Any, types: Mapping[str, type]) -> None:
    if not isinstance(row, dict) or row.keys() != types.keys():
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"it must have the fields {', '.join(types)}, not {found}")
    for name, type_ in types.items():
        if type(row[name]) is not type_:
            raise ValueError(f"{name!r} is {row[name]!r}, not of type {type_.__name__}")


# --- the generator


def _draw(template: str, generator: random.Random, taken: set[str]) -> tuple[str, tuple[SecretSpan, ...]]:
    """A note whose name, contact and number are not in `taken`, to which they are then added."""
    while True:
        values = {slot: draw(generator) for slot, (draw, _) in SLOTS.items()}
        own = {values[slot] for slot in ("name", "contact", "record")}
        if len(own) == 3 and not own & taken:
            break
    taken |= own
    text = ""
    spans = []
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            start = len(text)
            text += values[slot]
            spans.append(SecretSpan(start, len(text), slot, math.log2(SLOTS[slot][1])))
    return text, tuple(spans)


def _below(generator: random.Random, n: int) -> int:
    return int(generator.random() * n)


def _pick(generator: random.Random, values: Sequence[str]) -> str:
    return values[_below(generator, len(values))]


def _name(generator: random.Random) -> str:
    return f"{_pick(generator, FIRST_NAMES)} {_pick(generator, SURNAMES)}"


def _birth(generator: random.Random) -> str:
    day = _FIRST_BIRTH + timedelta(days=_below(generator, _BIRTHS))
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _review(generator: random.Random) -> str:
    day = date(2023, 1, 1) + timedelta(days=_below(generator, 365))
    return f"{day.day} {MONTHS[day.month - 1]}"


_BIRTHS = (_LAST_BIRTH - _FIRST_BIRTH).days + 1
_WARDS, _WINGS = 24, "ABCDEF"

SLOTS: dict[str, tuple[Callable[[random.Random], str], int]] = {
    "name": (_name, len(FIRST_NAMES) * len(SURNAMES)),
    "born": (_birth, _BIRTHS),
    "record": (lambda g: f"{_below(g, 10**_NUMBER_DIGITS):0{_NUMBER_DIGITS}d}", 10**_NUMBER_DIGITS),
    "ward": (lambda g: f"{1 + _below(g, _WARDS)}{_pick(g, _WINGS)}", _WARDS * len(_WINGS)),
    "physician": (lambda g: _pick(g, SURNAMES), len(SURNAMES)),
    "finding": (lambda g: _pick(g, FINDINGS), len(FINDINGS)),
    "contact": (_name, len(FIRST_NAMES) * len(SURNAMES)),
    "review": (_review, 365),
}
"""The secrets of a note: how each is drawn, and out of how many values, all equally likely."""

KINDS: dict[str, tuple[str, ...]] = {"clinical-note": CLINICAL_NOTES}
"""The kinds of canaries, and the templates of each."""
