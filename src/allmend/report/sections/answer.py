"""The plain answer: whether anything came out of the models, and whose it was."""

from collections.abc import Callable, Iterator, Sequence

from allmend.report import numbers
from allmend.report.base_rate import Outcome, Secrets, Verdict, hits, outcomes, secrets_of
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, paragraph, table, tag
from allmend.report.members import MemberOutcome, by_member
from allmend.report.sections.extraction import copies_of
from allmend.report.sections.utility import titled
from allmend.results import BASE, AuditTable, Estimate, longest_prefix

MOST_MEMBERS = 60
"""Rows of the table by member; the most serious stand first."""
MOST_NAMED = 6
"""Members that a sentence names."""
BY_CANARY = "of secrets, the percentage is the mean over canaries"
SIGNS = {Verdict.NOTHING: "○", Verdict.GUESSED: "≈", Verdict.UNCLEAR: "?", Verdict.MEMORISED: "▲"}


def badge(verdict: Verdict, words: str | None = None) -> Html:
    """A verdict as a sign and words, its own by default, so that colour is not needed."""
    sign = tag("span", SIGNS[verdict], aria_hidden="true")
    return tag("span", sign, " ", words or verdict.words, class_=f"verdict {verdict.name.lower()}")


def _of(*estimates: Estimate) -> str:
    return numbers.out_of(*hits(estimates))


def _cell(counts: str, share: Estimate) -> Cell:
    """A count, with the percentage and its interval under it."""
    ends = numbers.interval(share, lambda end: numbers.hundredths(end, 0))
    return Cell(counts, numbers.percent(share.value, 0) + (f" ({ends})" if ends else ""), share.value)


def _counted(estimate: Estimate | None) -> Cell:
    return Cell(numbers.NONE) if estimate is None else _cell(_of(estimate), estimate)


def _secrets(found: Secrets | None) -> Cell:
    return Cell(numbers.NONE) if found is None else _cell(numbers.out_of(found.out, found.asked), found.share)


def _answer(audit: AuditTable, model: str, found: Sequence[Outcome]) -> Html:
    """What came out of one model, in a sentence."""
    verdict, most = max(o.verdict for o in found), found[-1]
    controls = [o.control.exact for o in found if o.control]
    untrained = [o.planted.exact for o in outcomes(audit, BASE)]
    words = (
        f" recites {_of(*(o.planted.exact for o in found))} planted canaries without an error when given their first "
    )
    words += f"{longest_prefix(audit.extraction)}; {_of(*controls)} controls" if controls else "; there are no controls"
    words += f"; the base model {_of(*untrained)}." if untrained else "; the base model was not asked."
    if (secrets := secrets_of(most.planted)) is not None:
        null = secrets_of(most.control)
        words += f" Of the secrets behind it, {numbers.out_of(secrets.out, secrets.asked)} come out"
        words += f" with {copies_of(most.copies)}"
        words += f" ({numbers.out_of(null.out, null.asked)} in controls)." if null else "."
    if verdict is Verdict.NOTHING and (high := most.planted.exact.high) is not None:
        words += f" With {copies_of(most.copies)}, a share of up to {numbers.percent(high, 0)} is not ruled out."
    return tag("li", badge(verdict), paragraph(tag("strong", titled(model)), words))


def came_out(evidence: Evidence, audit: AuditTable) -> list[Html]:
    """Whether anything came out, by model, then by number of copies."""
    models = evidence.audited or [BASE]
    found = {model: cells for model in models if (cells := outcomes(audit, model))}
    if not found:
        return []
    untrained = {o.copies: o.planted for o in outcomes(audit, BASE)}
    body: Rows = []
    for o in (o for cells in found.values() for o in cells):
        three = (o.planted, o.control, untrained.get(o.copies))
        body.append(
            [
                titled(o.model),
                Cell(numbers.count(o.copies), value=o.copies),
                *(_counted(e.exact if e else None) for e in three),
                *(_secrets(secrets_of(e)) for e in three),
                badge(o.verdict),
            ]
        )
    beside = ["controls", "base model"]
    head = ["Model", "Copies", "Recited: planted", *beside, "Secrets out: planted", *beside, "Verdict"]
    caption = f"What comes out after the first {longest_prefix(audit.extraction)} of a canary"
    return [
        tag("h3", "Did anything come out?"),
        tag("ul", *(_answer(audit, model, cells) for model, cells in found.items()), class_="answers"),
        table(f"{caption} (95 % interval; {BY_CANARY})", head, body),
    ]


def _named(members: Sequence[MemberOutcome], words: Callable[[MemberOutcome], str]) -> str:
    more = f" and {len(members) - MOST_NAMED} more" if len(members) > MOST_NAMED else ""
    return ", ".join(map(words, members[:MOST_NAMED])) + more


def _whole(m: MemberOutcome) -> str:
    or_more = " or more" if len(m.copies) > 1 else ""
    return f"{m.client} ({_of(m.planted)}; with {copies_of(min(m.copies))}{or_more}; after {m.prefix})"


def _told(model: str, members: Sequence[MemberOutcome]) -> Iterator[str]:
    """Whose canaries a model gives away, in sentences."""
    serious = [m for m in members if m.verdict > Verdict.GUESSED]
    whole, part = [m for m in serious if m.copies], [m for m in serious if not m.copies]
    guessed = [m for m in members if m.verdict is Verdict.GUESSED]
    if whole:
        yield f"Whoever has {model} can bring out planted canaries of {_named(whole, _whole)}."
    if part:
        yield f"Single secrets, though no whole canary, come out of {model} for {_named(part, lambda m: m.client)}."
    if guessed:
        names = _named(guessed, lambda m: m.client)
        yield f"What {model} says of canaries of {names} it says of their controls as well: guessed, not memorised."
    if members and not serious and not guessed:
        yield f"Nothing came out of {model} for any member."


def _member(m: MemberOutcome, model: Sequence[str]) -> list[str | Cell]:
    copies = ", ".join(f"{copies_of(c)}: {numbers.count(n)}".replace(" ", "\u00a0") for c, n in m.copies.items())
    return [
        m.client,
        *model,
        _counted(m.planted),
        _counted(m.control),
        copies or numbers.NONE,
        m.prefix or numbers.NONE,
        _secrets(m.secrets),
        _secrets(m.control_secrets),
        badge(m.verdict),
    ]


def whose(evidence: Evidence, audit: AuditTable) -> list[Html]:
    """What each member needs to know of its own canaries; models that give nothing away have a sentence alone."""
    found = {model: by_member(evidence.probes, model, longest_prefix(audit.extraction)) for model in evidence.audited}
    if not any(found.values()):
        return []
    leaky = [model for model, members in found.items() if any(m.verdict for m in members)]
    lines = sorted((m for model in leaky for m in found[model]), key=lambda m: -m.verdict)
    caption = f"By member: its own canaries, recited after any prefix that was tried (95 % interval; {BY_CANARY})"
    if len(lines) > MOST_MEMBERS:
        caption += f"; the {MOST_MEMBERS} most serious, the rest is in results/audit.parquet"
    several = len(leaky) > 1
    head = ["Member", *["Model"][:several], "Recited: planted", "controls", "By copies", "Shortest prefix"]
    rows = [_member(m, [m.model][:several]) for m in lines[:MOST_MEMBERS]]
    return [
        tag("h3", "Whose was it?"),
        paragraph(" ".join(sentence for model, members in found.items() for sentence in _told(model, members))),
        table(caption, [*head, "Secrets out: planted", "controls", "Verdict"], rows),
    ]
