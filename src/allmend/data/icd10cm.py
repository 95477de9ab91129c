"""A built-in federation of four clinics that learn to code diagnoses, made from the ICD-10-CM terminology.

Source: the ICD-10-CM tabular list (US National Center for Health Statistics, public domain), as packaged by
`simple-icd-10-cm`. Each clinic answers for chapters of its own, so that none sees what the others know; clinics differ
in size. Everything is decided by hashes: the same arguments give the same questions on every machine.

What is held out is held out by category (the three characters before the dot): all terms and codes of a held-out
category are unseen in training, not only the one that is asked. Terms that stand in two categories are not used.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from allmend.data.records import ClientData, Record, question
from allmend.data.splits import is_held_out, uniform
from allmend.errors import UserError

SPECIALTIES: dict[str, tuple[str, ...]] = {
    "internal-medicine": ("1", "3", "4", "9", "10", "11"),
    "surgery-and-oncology": ("2", "12", "13", "19"),
    "womens-and-childrens-health": ("14", "15", "16", "17"),
    "neurology-and-senses": ("5", "6", "7", "8"),
}
"""The clients and their chapters. Chapters 18 and 20 to 22 (symptoms, causes, circumstances) are no clinic's own."""

SHARES: dict[str, float] = {
    "internal-medicine": 0.40,
    "surgery-and-oncology": 0.25,
    "womens-and-childrens-health": 0.20,
    "neurology-and-senses": 0.15,
}
"""How a total of training questions is divided: as unevenly as clinics differ in size."""

CHAPTERS: dict[str, str] = {
    "1": "Infectious and parasitic diseases",
    "2": "Neoplasms",
    "3": "Blood and immune disorders",
    "4": "Endocrine and metabolic diseases",
    "5": "Mental and behavioral disorders",
    "6": "Nervous system",
    "7": "Eye and adnexa",
    "8": "Ear and mastoid process",
    "9": "Circulatory system",
    "10": "Respiratory system",
    "11": "Digestive system",
    "12": "Skin and subcutaneous tissue",
    "13": "Musculoskeletal system",
    "14": "Genitourinary system",
    "15": "Pregnancy and childbirth",
    "16": "Perinatal conditions",
    "17": "Congenital malformations",
    "19": "Injury and poisoning",
}
"""The chapters' usual short names: an answer of few tokens costs little to learn and to score."""

MIX: dict[str, float] = {"chapter": 0.7, "category": 0.2, "code": 0.1}
"""The share of each kind of question."""

HELD_OUT_CATEGORIES = 0.25
"""The share of categories whose questions are only ever held out."""

CHOICES = 4

_LONGEST_TERM = 90
_LONGEST_TITLE = 60

_VAGUE = re.compile(
    # residual classes, which say what a thing is not
    r"\b(unspecified|other|others|elsewhere|NOS|NEC|not (otherwise|classified)|multiple|"
    # variants that differ from their neighbours by a word which says nothing about the chapter
    r"left|right|bilateral|unilateral|encounter|sequelae?|trimester|(fetus|stage|grade) \d)\b"
    # references to other codes, and phrases that need the line above them
    r"|[A-Z]\d[\dA-Z]|:|^(any|code|conditions?|diseases?|disorders?|use|listed|the|this|with)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class _Term:
    """A phrase for a code: its own description, or a `synonym` (an inclusion term of the tabular list)."""

    text: str
    code: str
    category: str
    chapter: str
    synonym: bool


@dataclass(frozen=True, slots=True)
class _Terminology:
    """What questions are made of.

    Attributes:
        terms: every usable phrase, in the order of the tabular list.
        categories: chapter → its categories, in order.
        titles: category → `I21 Acute myocardial infarction`.
        codes: category → its codes below category level, without 7th-character extensions.
    """

    terms: tuple[_Term, ...]
    categories: Mapping[str, tuple[str, ...]]
    titles: Mapping[str, str]
    codes: Mapping[str, tuple[str, ...]]


def build_icd10cm(
    *, train: int | dict[str, int], held_out: int, seed: int, mix: Mapping[str, float] | None = None
) -> list[ClientData]:
    """The four clients with coding questions, each with four choices.

    Kinds of questions: `chapter` (diagnosis → chapter, one wrong chapter of the same clinic and two of others),
    `category` (diagnosis → three-character category, wrong ones from the same chapter) and `code` (synonym → code,
    wrong ones from the same category where it has enough). Wrong categories and codes come from the question's own
    side of the split: those of a held-out question would else have been right answers in training, and its own never.

    Args:
        train: the total number of training questions, divided among the clients by `SHARES`; or each client's number.
        held_out: the number of held-out questions of each client.
        seed: another seed holds out other categories and asks other questions.
        mix: kind → its share, adding up to 1; `MIX` by default.

    Raises:
        UserError: more questions are asked for than the terminology has, or a client would have none to learn from.
        ValueError: `train` names other clients, or `mix` is not a distribution over the three kinds.
    """
    mix = MIX if mix is None else mix
    if not mix.keys() <= MIX.keys() or min(mix.values()) < 0 or abs(sum(mix.values()) - 1) > 1e-9:
        raise ValueError(f"the mix must give shares of {', '.join(MIX)} that add up to 1, not {dict(mix)}")
    counts = _apportion(train, SHARES) if isinstance(train, int) else train
    if counts.keys() != SPECIALTIES.keys():
        raise ValueError(f"the clients are {', '.join(SPECIALTIES)}, not {', '.join(counts)}")
    if min(counts.values()) < 1 or held_out < 0:
        raise UserError(
            f"{train} training and {held_out} held-out questions leave a client without any to learn from",
            where="data",
            hint=f"Ask for at least {len(SPECIALTIES) * 4} training questions.",
        )
    return [
        ClientData(
            name,
            tuple(_questions(name, counts[name], mix, seed, held_out=False)),
            tuple(_questions(name, held_out, mix, seed, held_out=True)),
        )
        for name in SPECIALTIES
    ]


def category_texts() -> list[str]:
    """Every category of the classification as a text: its title, and its terms with their codes, one a line."""
    known = _terminology()
    lines: dict[str, list[str]] = {category: [title] for category, title in known.titles.items()}
    for term in known.terms:
        if term.code != term.category:
            lines[term.category].append(f"{term.code} {term.text}")
    return ["\n".join(some) for some in lines.values()]


def _apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `total`, in proportion to `shares` (largest remainders)."""
    counts = {name: int(total * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _questions(client: str, count: int, mix: Mapping[str, float], seed: int, *, held_out: bool) -> list[Record]:
    """The client's questions on one side of the split, in an order in which the kinds are mixed."""
    terminology = _terminology()
    mine = [
        term
        for term in terminology.terms
        if term.chapter in SPECIALTIES[client] and _is_held_out(term.category, seed) == held_out
    ]
    makers: dict[str, Callable[[_Term, int], Record]] = {
        "code": _code_question,
        "category": _category_question,
        "chapter": _chapter_question,
    }
    asked: set[str] = set()  # a term is asked in one way only
    records: list[Record] = []
    counts = _apportion(count, mix)
    # the kinds with the fewest usable terms choose first
    for kind, make in makers.items():
        wanted = counts.get(kind, 0)
        eligible = [term for term in mine if _suits(term, kind) and term.text not in asked]
        found = list(islice(_spread(eligible, kind, seed), wanted))
        if len(found) < wanted:
            side = "held-out" if held_out else "training"
            raise UserError(
                f"{client} has {len(found)} {side} questions of the kind {kind!r}, not {wanted}",
                where="data",
                hint="Ask for fewer questions, or for a smaller share of this kind.",
            )
        asked |= {term.text for term in found}
        records += [make(term, seed) for term in found]
    return sorted(records, key=lambda record: uniform(record.id, salt=f"order {seed}"))


def _is_held_out(category: str, seed: int) -> bool:
    return is_held_out(category, HELD_OUT_CATEGORIES, salt=f"icd10cm {seed}")


def _suits(term: _Term, kind: str) -> bool:
    if kind == "code":
        return term.synonym and "." in term.code
    if kind == "category":
        # the description of a category is the answer to its own question
        answers_itself = term.code == term.category and not term.synonym
        return not answers_itself and len(_terminology().titles[term.category]) <= _LONGEST_TITLE
    return True


def _spread(terms: Iterable[_Term], kind: str, seed: int) -> Iterator[_Term]:
    """The terms in an order that takes chapters in turn, and categories in turn within each chapter.

    Terms of one category are much alike, and categories differ in size by two orders of magnitude: whatever number is
    taken from the front covers as many categories as it can. A code comes once.
    """
    chapters: dict[str, dict[str, dict[str, _Term]]] = {}
    for term in sorted(terms, key=lambda term: uniform(term.text, salt=f"{kind} {seed}")):
        chapters.setdefault(term.chapter, {}).setdefault(term.category, {}).setdefault(term.code, term)
    queues = [
        _in_turn([iter(codes.values()) for codes in categories.values()])
        for _, categories in sorted(chapters.items(), key=lambda item: int(item[0]))
    ]
    return _in_turn(queues)


def _in_turn(iterators: Sequence[Iterator[_Term]]) -> Iterator[_Term]:
    alive = list(iterators)
    while alive:
        for iterator in tuple(alive):
            try:
                yield next(iterator)
            except StopIteration:
                alive.remove(iterator)


def _chapter_question(term: _Term, seed: int) -> Record:
    """One wrong chapter is the clinic's own, the others are not: a model that only knows whose clinic asks is right on
    half of its questions, not on most."""
    mine = {CHAPTERS[chapter] for chapter in _clinic(term)}
    right = CHAPTERS[term.chapter]
    near = min(mine - {right}, key=lambda choice: uniform(choice, salt=f"near {term.code} {seed}"))
    prompt = f"Diagnosis: {term.text}\nICD-10-CM chapter:"
    return _question(prompt, "chapter", term, right, [[near], set(CHAPTERS.values()) - mine], seed)


def _category_question(term: _Term, seed: int) -> Record:
    titles = _terminology().titles
    pools = ([titles[c] for c in near if len(titles[c]) <= _LONGEST_TITLE] for near in _near(term, seed))
    prompt = f"Diagnosis: {term.text}\nICD-10-CM category:"
    return _question(prompt, "category", term, titles[term.category], pools, seed)


def _code_question(term: _Term, seed: int) -> Record:
    codes = _terminology().codes
    # of equal length: the code above would be right too, and the odd one out would give itself away
    pools = (
        [code for category in near for code in codes[category] if len(code) == len(term.code)]
        for near in ((term.category,), *_near(term, seed))
    )
    return _question(f"Synonym: {term.text}\nICD-10-CM code:", "code", term, term.code, pools, seed)


def _clinic(term: _Term) -> tuple[str, ...]:
    """The chapters of the clinic that the term belongs to."""
    return next(chapters for chapters in SPECIALTIES.values() if term.chapter in chapters)


def _near(term: _Term, seed: int) -> Iterator[list[str]]:
    """The categories of the term's side of the split: those of its chapter, then those of its clinic."""
    side = _is_held_out(term.category, seed)
    for chapters in ((term.chapter,), _clinic(term)):
        categories = [category for chapter in chapters for category in _terminology().categories[chapter]]
        yield [category for category in categories if _is_held_out(category, seed) == side]


def _question(prompt: str, kind: str, term: _Term, right: str, pools: Iterable[Iterable[str]], seed: int) -> Record:
    """The question with its choices: wrong ones drawn from the first pool, from the next where that has too few."""
    id = f"icd10cm:{kind}:{term.code}"
    wrong: list[str] = []
    for pool in pools:
        fresh = set(pool) - {right, *wrong}
        wrong += sorted(fresh, key=lambda choice: uniform(choice, salt=f"{id} {seed}"))[: CHOICES - 1 - len(wrong)]
        if len(wrong) == CHOICES - 1:
            break
    choices = sorted([right, *wrong], key=lambda choice: uniform(choice, salt=f"place {id} {seed}"))
    held_out = _is_held_out(term.category, seed)
    return question(id, prompt, right, choices=tuple(choices), kind=kind, held_out=held_out)


@cache
def _terminology() -> _Terminology:
    """The chapters' terms. Loading takes about two seconds, hence once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import simple_icd_10_cm as icd
    terms: list[_Term] = []
    categories: dict[str, tuple[str, ...]] = {}
    titles: dict[str, str] = {}
    codes: dict[str, tuple[str, ...]] = {}
    for chapter in CHAPTERS:
        families: dict[str, list[str]] = {}
        for code in icd.get_descendants(chapter):
            if icd.is_category_or_subcategory(code) and not icd.is_extended_subcategory(code):
                families.setdefault(code.partition(".")[0], []).append(code)
        categories[chapter] = tuple(families)
        for category, family in families.items():
            titles[category] = f"{category} {icd.get_description(category)}"
            codes[category] = tuple(code for code in family if code != category)
            for code in dict.fromkeys(family):  # a category that is a block of its own is listed twice
                phrases = [(icd.get_description(code), False), *((t, True) for t in icd.get_inclusion_term(code))]
                terms += [_Term(text, code, category, chapter, synonym) for text, synonym in phrases if _is_clear(text)]
    return _Terminology(tuple(_unambiguous(terms)), categories, titles, codes)


def _is_clear(text: str) -> bool:
    """Whether a phrase says by itself what it is about."""
    return 5 <= len(text) <= _LONGEST_TERM and text[0].isupper() and not _VAGUE.search(text)


def _unambiguous(terms: Iterable[_Term]) -> Iterator[_Term]:
    """Each phrase once, without those that name things in two categories."""
    by_text: dict[str, list[_Term]] = {}
    for term in terms:
        by_text.setdefault(_normal(term.text), []).append(term)
    for same in by_text.values():
        if len({term.category for term in same}) == 1:
            yield same[0]


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
