"""The audit of one model: every measure on every canary, controls beside inserted ones, and on clients' records."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from allmend.audit.answers import Answers, ask, prefixes_of, slots_of
from allmend.audit.epsilon import epsilon_bound
from allmend.audit.exposure import RANK_ALL
from allmend.audit.extraction import locate_secrets
from allmend.audit.likelihood import Reading, Scheme, check_finite, likelihood_gaps, read_texts
from allmend.audit.membership import membership_rows, refusals, scores
from allmend.audit.ranks import rank_tests
from allmend.data.canaries import Canary
from allmend.data.canary_kinds import number_of_values
from allmend.data.chat import Encoder
from allmend.data.identifiers import count_identifiers
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.probes import Probe
from allmend.recipe import Audit
from allmend.results import (
    Discoverable,
    EpsilonBound,
    Exposure,
    Extraction,
    LikelihoodGap,
    Membership,
    RankTest,
    Whose,
)

RowT = TypeVar("RowT", Discoverable, EpsilonBound, Exposure, Extraction, LikelihoodGap, Membership)


@dataclass(frozen=True)
class RecordGroup:
    """A client's own records: some that it trains on and some that it does not.

    Attributes:
        client: its name.
        members, non_members: the records.
        what: they are.
    """

    client: str
    members: Sequence[Record]
    non_members: Sequence[Record]
    what: str = "records"

    @property
    def label(self) -> str:
        """What the group is called in the tables."""
        return f"{self.what} of {self.client}"


@dataclass(frozen=True)
class Findings:
    """What the audit found in one model.

    Attributes:
        model: its name.
        extraction, discoverable, gaps, exposure, membership, epsilon: rows of the audit's tables.
        probes: one row for each canary and prefix.
        skipped: (canary, prefix) pairs whose prefix is no shorter than the canary.
        refused: figures that are missing, and why.
        identifiers: what looks like personal data in the continuations, by kind.
        ranks: whether the model knows canaries above chance, where it is a member's own.
        readings: the canaries under this model.
        group_readings: the records of each group, by its label.
    """

    model: str
    extraction: tuple[Extraction, ...]
    discoverable: tuple[Discoverable, ...]
    gaps: tuple[LikelihoodGap, ...]
    exposure: tuple[Exposure, ...]
    membership: tuple[Membership, ...]
    epsilon: tuple[EpsilonBound, ...]
    probes: tuple[Probe, ...]
    skipped: int
    refused: tuple[str, ...]
    identifiers: dict[str, int]
    ranks: tuple[RankTest, ...]
    readings: Sequence[Reading]
    group_readings: Mapping[str, Sequence[Reading]]


def audit_model(
    name: str,
    model: Any,
    encoder: Encoder,
    canaries: Sequence[Canary],
    settings: Audit,
    *,
    seed: int,
    reference: Findings | None = None,
    groups: Sequence[RecordGroup] = (),
    unseen: Collection[str] = (),
    delta: float = 0.0,
    accounted: float | None = None,
    member: str | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Findings:
    """Measure one model.

    Args:
        name: of the model, for the tables.
        model: a causal language model in evaluation mode.
        encoder: as in training.
        canaries: inserted ones and controls.
        settings: the audit's design.
        seed: of bootstraps and sampled values.
        reference: findings of the base model on the same canaries, and on these groups at least; None for the base
            model itself, or where there is none, and then there are no scores relative to it.
        groups: clients' records that membership is inferred for.
        unseen: ids of inserted canaries that training never drew. They count in the bound on ε, whose coins they
            keep, and nowhere else.
        delta: of the bound on ε.
        accounted: the accountant's ε for one record, shown beside the bound.
        member: whose own model it is: rows are then of its own canaries and records, and of the others', apart.
        on_tokens: told the tokens read or generated.

    Raises:
        UserError: there are no inserted canaries or no controls, so that no figure would have its null; or a
            canary's secret lies outside its text; or the model's likelihoods are no finite numbers.
    """
    if not any(canary.inserted for canary in canaries) or all(canary.inserted for canary in canaries):
        raise UserError(
            "an audit needs inserted canaries and controls; one of the two is missing",
            where="canaries",
            hint="Plant more canaries (canaries.count): a coin for each decides.",
        )
    located = [locate_secrets(encoder, canary) for canary in canaries]
    readings = read_texts(model, [text for text, _ in located], scheme=_scheme(settings), on_tokens=on_tokens)
    check_finite([reading.log_likelihood for reading in readings], of="the canaries", where=name)
    records = [encoder.for_training(record) for group in groups for record in (*group.members, *group.non_members)]
    read_records = read_texts(model, records, on_tokens=on_tokens)
    check_finite([reading.log_likelihood for reading in read_records], of="the clients' records", where=name)
    read = iter(read_records)
    group_readings = {group.label: [next(read) for _ in (*group.members, *group.non_members)] for group in groups}
    seen = [place for place, canary in enumerate(canaries) if canary.id not in unseen]
    answers = ask(
        name,
        model,
        encoder,
        [canaries[place] for place in seen],
        [located[place][1] for place in seen],
        [readings[place] for place in seen],
        settings,
        seed=seed,
        on_tokens=on_tokens,
    )
    known = {canary.id: reading for canary, reading in zip(canaries, readings, strict=True)}
    base = None if reference is None else dict(zip(known, reference.readings, strict=True))
    rows = _Rows([], [], [], [], [], [])
    refused: list[str] = []
    ranks: list[RankTest] = []
    if unseen:
        refused.append(
            f"{name}: any measure but the bound on ε of planted canaries that Poisson sampling never drew "
            f"({len(unseen)})"
        )
    for whose, chosen in _parts(member).items():
        about, every = answers.of(chosen), [canary for canary in canaries if chosen(canary)]
        if not every:
            refused.append(f"{_called(name, whose, member)}: there are none")
            continue
        membership, lacking = _membership(_called(name, whose, member), about, every, base, seed)
        refused += lacking
        rows.extraction += _about(whose, about.extraction())
        rows.discoverable += _about(whose, about.discoverable(settings))
        rows.gaps += _about(whose, likelihood_gaps(name, about.canaries, about.readings))
        rows.exposure += _about(whose, about.exposure())
        rows.membership += _about(whose, [row.model_copy(update={"model": name}) for row in membership])
        rows.epsilon += _about(whose, _epsilon(name, every, known, base, delta, accounted))
        if whose is not None and base is not None:
            ranks += rank_tests(name, whose, about.canaries, about.readings, [base[one.id] for one in about.canaries])
    for group in groups:
        before = reference.group_readings[group.label] if reference else None
        found = _membership_of(group, name, group_readings[group.label], before, seed)
        rows.membership += _about(_whose(group.client, member), found)
    if reference is None:  # say it once, for the base model
        refused += answers.not_exposed()
    return Findings(
        model=name,
        extraction=tuple(rows.extraction),
        discoverable=tuple(rows.discoverable),
        gaps=tuple(rows.gaps),
        exposure=tuple(rows.exposure),
        membership=tuple(rows.membership),
        epsilon=tuple(rows.epsilon),
        probes=tuple(answers.probes(settings)),
        skipped=answers.skipped,
        refused=tuple(refused),
        identifiers=count_identifiers(answers.texts),
        ranks=tuple(ranks),
        readings=readings,
        group_readings=group_readings,
    )


@dataclass
class _Rows:
    """Rows as they are collected, part by part."""

    extraction: list[Extraction]
    discoverable: list[Discoverable]
    gaps: list[LikelihoodGap]
    exposure: list[Exposure]
    membership: list[Membership]
    epsilon: list[EpsilonBound]


def _whose(client: str, member: str | None) -> Whose | None:
    """Whose canaries and records those of a client are to the member whose model is asked."""
    if member is None:
        return None
    return "own" if client == member else "others"


def _parts(member: str | None) -> dict[Whose | None, Callable[[Canary], bool]]:
    """The canaries that rows are about."""
    parts: tuple[Whose | None, ...] = (None,) if member is None else ("own", "others")

    def chosen(part: Whose | None) -> Callable[[Canary], bool]:
        return lambda canary: _whose(canary.client, member) == part

    return {part: chosen(part) for part in parts}


def _called(name: str, whose: Whose | None, member: str | None) -> str:
    """What a reason speaks of: canaries are the same in the models of all arms, where the reason then stands once."""
    match whose:
        case "own":
            return f"canaries of {member} in its own models"
        case "others":
            return f"canaries of others in models of {member}"
    return name


def _about(whose: Whose | None, rows: Iterable[RowT]) -> list[RowT]:
    return [row.model_copy(update={"whose": whose}) for row in rows]


def no_prefix_fits(canaries: Sequence[Canary], encoder: Encoder, settings: Audit) -> str:
    """Why there would be nothing to bring out of any canary; empty if there is something."""
    longest = max(len(encoder.for_evaluation(Record(canary.id, text=canary.text))) for canary in canaries)
    if any(prefix.behind(longest, settings.suffix_tokens) for prefix in prefixes_of(settings)):
        return ""
    shortest = prefixes_of(settings)[0].label
    return f"no canary has more than {longest} tokens, so that nothing stands behind a prefix of {shortest}"


def tokens_to_read(
    canaries: Sequence[Canary], encoder: Encoder, settings: Audit, groups: Sequence[RecordGroup]
) -> float:
    """What `audit_model` reads and generates, about, in tokens."""
    lengths = [len(encoder.for_evaluation(Record(canary.id, text=canary.text))) for canary in canaries]
    total = float(sum(lengths))
    for prefix in prefixes_of(settings):
        total += sum(len(prefix.behind(length, settings.suffix_tokens)) for length in lengths)
    for canary, length in zip(canaries, lengths, strict=True):
        slots = slots_of(canary.kind, settings)
        for span in canary.secret_spans:
            if span.slot in slots:
                values = number_of_values(canary.kind, span.slot)
                compared = values if values <= RANK_ALL else settings.exposure_samples
                # a value has as large a share of the tokens as it has of the characters
                total += compared * max(1, length * (span.end - span.start) / len(canary.text))
    records = (record for group in groups for record in (*group.members, *group.non_members))
    return total + sum(len(encoder.for_training(record)) for record in records)


def _scheme(settings: Audit) -> Scheme:
    return Scheme(settings.temperature, settings.top_k)


def _membership(
    name: str, answers: Answers, canaries: Sequence[Canary], base: Mapping[str, Reading] | None, seed: int
) -> tuple[list[Membership], list[str]]:
    """Inserted canaries of each number of copies against all controls, which come from the same generator.

    Args:
        name: of the model.
        answers: about canaries that training has drawn, and controls.
        canaries: these and the others.
        base: by canary, under the base model.
        seed: of bootstraps.
    """
    scored = [
        (canary, scores(reading, canary.text, base=base[canary.id] if base else None))
        for canary, reading in zip(answers.canaries, answers.readings, strict=True)
    ]
    controls = [found for canary, found in scored if not canary.inserted]
    rows: list[Membership] = []
    refused: list[str] = []
    for copies in sorted({canary.copies for canary in canaries}):
        inserted = [found for canary, found in scored if canary.inserted and canary.copies == copies]
        rows += membership_rows(
            name, records="canaries", copies=copies, members=inserted, non_members=controls, seed=seed
        )
        if not inserted:
            refused.append(f"{name}: all but ε of canaries with {copies} copies: none was inserted and seen")
        if all(canary.inserted for canary in canaries if canary.copies == copies):
            refused.append(f"{name}: likelihood gap of canaries with {copies} copies: none of them is a control")
    if base is None:  # say it once, for the base model
        refused += refusals(records="canaries", copies=None, members=1, non_members=len(controls))
    return rows, refused


def _membership_of(
    group: RecordGroup, name: str, readings: Sequence[Reading], base: Sequence[Reading] | None, seed: int
) -> list[Membership]:
    records = (*group.members, *group.non_members)
    found = [
        scores(reading, record.response, base=base[place] if base else None)
        for place, (record, reading) in enumerate(zip(records, readings, strict=True))
    ]
    members = len(group.members)
    return membership_rows(
        name,
        records=group.label,
        copies=None,
        members=found[:members],
        non_members=found[members:],
        seed=seed,
    )


def _epsilon(
    name: str,
    canaries: Sequence[Canary],
    readings: Mapping[str, Reading],
    base: Mapping[str, Reading] | None,
    delta: float,
    accounted: float | None,
) -> Iterator[EpsilonBound]:
    """The bound from the canaries of each number of copies, and from all of them."""
    values = [readings[canary.id].log_likelihood.mean().item() for canary in canaries]
    if base is not None:
        before = [base[canary.id].log_likelihood.mean().item() for canary in canaries]
        values = [value - one for value, one in zip(values, before, strict=True)]
    numbers = Counter(canary.copies for canary in canaries)
    for copies in [*sorted(numbers), None] if len(numbers) > 1 else sorted(numbers):
        chosen = [place for place, canary in enumerate(canaries) if copies in (None, canary.copies)]
        yield epsilon_bound(
            [values[place] for place in chosen],
            [canaries[place].inserted for place in chosen],
            model=name,
            copies=copies,
            delta=delta,
            accounted=accounted if copies == 1 else None,
            score="loss" if base is None else "ratio",
        )
