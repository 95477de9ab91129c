"""The page of `allmend attribute MODEL`: which records, and whose, moved an adapter, and how sure that is.

It shows the beginning of records: it is for whoever may read them, and stays with them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend.report import numbers
from allmend.report.findings import Finding, verdict
from allmend.report.influence_figures import (
    MARK,
    UNIT,
    ScoredRecord,
    client_map,
    client_means,
    client_table,
    ends,
    helped_and_hurt,
    how_sure,
    record_table,
    score_histograms,
    typical,
)
from allmend.report.markup import Cell, Html, Rows, details, join, listed, paragraph, section, table, tag, terms
from allmend.report.page import fill, head_of
from allmend.report.summary import cards
from allmend.results import Estimate, MemberInfluence, in_typical_scores
from allmend.run import write_atomic

LETTERS = 80
"""Of a record's text."""
MOST_TARGETS = 12
"""Targets that have a section of their own."""
MOST_NAMED = 20
"""Records without a score that are named."""


@dataclass(frozen=True)
class Damped:
    """What another damping makes of a target's order.

    Attributes:
        target: which.
        damping: times the mean eigenvalue of each block.
        agreement: rank correlation with the scores on this page; None where all scores are equal.
        halves: that of the scores which two halves of the target records give; None for a single target record.
    """

    target: str
    damping: float
    agreement: float | None
    halves: Estimate | None


@dataclass(frozen=True)
class Attribution:
    """What there is to show.

    Attributes:
        records: scored, for each target.
        clients: figures by client and target, in the clients' order.
        halves: by target: the rank correlation of the scores that two halves of the target records give.
        facts: terms and what they are here, for the head of the page.
        settings: the same, of how it was measured.
        cautions: why every score is to be taken with care.
        notes: what else a reader should know.
        silent: ids of records without a score, by client.
        dampings: other ones, where they were tried.
        about_dampings: what they do not tell.
    """

    records: Sequence[ScoredRecord]
    clients: Sequence[MemberInfluence]
    halves: Mapping[str, Estimate]
    facts: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]
    cautions: Sequence[str] = ()
    notes: Sequence[str] = ()
    silent: Mapping[str, Sequence[str]] | None = None
    dampings: Sequence[Damped] = ()
    about_dampings: str = ""

    @property
    def targets(self) -> list[str]:
        """In the order of the records."""
        return list(dict.fromkeys(record.target for record in self.records))

    @property
    def told(self) -> dict[str, list[MemberInfluence]]:
        """Clients' figures by target, in units of the mean absolute score."""
        return {
            target: in_typical_scores([one for one in self.clients if one.target == target]) for target in self.targets
        }

    @property
    def looks(self) -> dict[str, int]:
        """Of the clients, the same in every chart."""
        return {client: look for look, client in enumerate(dict.fromkeys(one.client for one in self.clients))}


def write_attributed(path: Path, found: Attribution) -> Path:
    """Write the page, readable by its owner alone, and return its path.

    Raises:
        UserError: the operating system refused.
    """
    told, targets = found.told, found.targets
    shown = targets[:MOST_TARGETS]
    parts = [(f"target-{place}", f"For {target}", target) for place, target in enumerate(shown)]
    contents = [(anchor, title) for anchor, title, _ in parts]
    sections = [_target(anchor, title, found, told[target]) for anchor, title, target in parts]
    if len(targets) > 1:
        contents.insert(0, ("clients", "Clients and targets"))
        sections.insert(0, _clients(found, told, len(targets) - len(shown)))
    page = fill(
        title="influence · allmend",
        head=head_of("Allmend, influence of records", "Which records moved the model", found.facts),
        contents=[*contents, ("measured", "How it was measured")],
        summary=_summary(found, told),
        sections=[*sections, _measured(found)],
    )
    write_atomic(path, page.encode(), mode=0o600)
    return path


def _summary(found: Attribution, told: Mapping[str, Sequence[MemberInfluence]]) -> Html:
    return join(
        [
            *(paragraph(f"{MARK} {words}", class_="warning") for words in found.cautions),
            cards([_whose(told), _which(found), _sure(found)]),
            paragraph(
                "A score above 0 says that training on the record lowered the target’s loss, at the adapter’s weights "
                f"and to first order. Scores have no unit of their own; on this page they are {UNIT}, with the "
                "score as it stands in influence.parquet below. "
                + (f"{MARK} marks scores to be taken with care." if found.cautions else "")
            ),
        ]
    )


def _whose(told: Mapping[str, Sequence[MemberInfluence]]) -> Finding:
    sides = [verdict(one.mean) for some in told.values() for one in some]
    helped, hurt, unclear = (sides.count(which) for which in (1, -1, 0))
    if len(told) == 1:
        about, words = "clients helped", helped_and_hurt(told)
    else:
        about = "pairs of client and target with a mean above 0"
        words = f"{numbers.count(hurt)} below 0, {numbers.count(unclear)} unclear. The map shows which."
    return Finding("Whose data helped?", numbers.out_of(helped, len(sides)), about, words)


def _which(found: Attribution) -> Finding:
    below = sum(record.score < 0 for record in found.records)
    words = (
        "Read the most harmful ones before anything is concluded: a rare but right record may score like a wrong one."
    )
    return Finding(
        "Which records hurt?",
        numbers.percent(below / len(found.records)),
        f"of scores are below 0: {numbers.out_of(below, len(found.records))}",
        words if below else "None has a score below 0.",
    )


def _sure(found: Attribution) -> Finding:
    question, about = "How sure is the order?", "rank correlation of two halves"
    if not found.halves:
        return Finding(question, numbers.NONE, about, "A target that is one record has no halves to compare.")
    if len(found.halves) == 1:
        (one,) = found.halves.values()
        words = how_sure(one)
        return Finding(question, numbers.number(one.value), f"{about} ({_of(one)})", f"{words[0].upper()}{words[1:]}.")
    values = sorted(one.value for one in found.halves.values())
    span = f"{numbers.number(values[0])} to {numbers.number(values[-1])}"
    return Finding(question, span, f"{about}, by target", "Each target’s section says what it is there.")


def _of(agrees: Estimate) -> str:
    splits = numbers.counted(agrees.n, "split")
    return ", ".join(filter(None, (numbers.interval(agrees, numbers.number), splits)))


def _clients(found: Attribution, told: Mapping[str, Sequence[MemberInfluence]], left_out: int) -> Html:
    rows = sum(map(len, told.values()))
    more = f"{numbers.counted(left_out, 'target')} more in influence.parquet; the first {MOST_TARGETS} have a section."
    return section(
        "clients",
        "Clients and targets",
        tag("div", client_map(told, list(found.looks)), class_="charts"),
        details(f"In figures ({numbers.counted(rows, 'row')})", client_table(told)),
        paragraph(more) if left_out else None,
    )


def _target(anchor: str, title: str, found: Attribution, clients: Sequence[MemberInfluence]) -> Html:
    target = clients[0].target
    records = [record for record in found.records if record.target == target]
    unit = typical([record.score for record in records])
    by_client = {
        one.client: [record.score / unit for record in records if record.client == one.client] for one in clients
    }
    helpful, harmful = ends(records)
    mark = MARK if found.cautions else ""

    def shown(caption: str, some: Sequence[ScoredRecord]) -> Html:
        return record_table(caption, some, letters=LETTERS, of=len(records), unit=unit, mark=mark)

    charts = [
        client_means({target: clients}, found.looks),
        score_histograms(by_client, found.looks, title="How the scores spread", unit=UNIT),
    ]
    agrees = found.halves.get(target)
    sure = f"{how_sure(agrees)} (Spearman {numbers.number(agrees.value)}, {_of(agrees)})" if agrees else ""
    return section(
        anchor,
        title,
        tag("div", *charts, class_="charts"),
        paragraph(helped_and_hurt({target: clients})),
        paragraph(f"{sure[0].upper()}{sure[1:]}.") if sure else None,
        client_table({target: clients}),
        shown("Most harmful records", harmful) or paragraph("No record has a score below 0."),
        shown("Most helpful records", helpful) or paragraph("No record has a score above 0."),
    )


def _measured(found: Attribution) -> Html:
    silent = [
        f"Without a score, {client}: {', '.join(ids[:MOST_NAMED])}{' …' if len(ids) > MOST_NAMED else ''}."
        for client, ids in (found.silent or {}).items()
    ]
    return section(
        "measured",
        "How it was measured",
        terms(found.settings),
        _dampings(found),
        listed((*found.notes, *silent)),
    )


def _dampings(found: Attribution) -> Html:
    rows: Rows = [
        [
            one.target,
            Cell(numbers.number(one.damping), value=one.damping),
            Cell(numbers.NONE if one.agreement is None else numbers.number(one.agreement), value=one.agreement),
            Cell(numbers.NONE)
            if one.halves is None
            else Cell(numbers.number(one.halves.value), numbers.interval(one.halves, numbers.number), one.halves.value),
        ]
        for one in found.dampings
    ]
    if not rows:
        return Html("")
    caption = "Under other dampings (Spearman’s correlations)"
    head = ["Target", "Damping", "Order as on this page", "Order of two halves of the target records"]
    return join([table(caption, head, rows), paragraph(found.about_dampings)])
